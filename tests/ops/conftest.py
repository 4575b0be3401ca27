"""The tests of an op that has CUDA kernels run them too, in place of the CPU's."""

from collections.abc import Iterator

import pytest
import torch

from tests.cuda_on_cpu import MISSING, OPS, ORDERS, cuda_on_cpu


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    op = metafunc.module.__name__.rpartition("test_")[-1]
    only_cpu = metafunc.definition.get_closest_marker("only_cpu")
    if op in OPS and not only_cpu:
        slow = [pytest.param(order, marks=pytest.mark.slow) for order in ORDERS[:-1]]
        metafunc.parametrize("kernels", ["cpu", ORDERS[-1], *slow], indirect=True)


@pytest.hookimpl(tryfirst=True)  # before slow tests are left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In fp64 CUDA kernels do what they do in fp32, and take longest here."""
    for item in items:
        values = item.callspec.params if hasattr(item, "callspec") else {}
        if values.get("kernels", "cpu") != "cpu" and values.get("dtype") == torch.float64:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    order = getattr(request, "param", "cpu")
    if order == "cpu":
        yield
    elif MISSING:
        pytest.skip(f"CUDA kernels on the CPU: {MISSING}")
    else:
        with cuda_on_cpu(order):
            yield
