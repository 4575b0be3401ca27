"""The tests of an op that has CUDA kernels run them too, in place of the CPU's: executed on the
CPU, and on a GPU where there is one."""

from collections.abc import Iterator

import pytest
import torch

from tests.cuda_on_cpu import MISSING, OPS, ORDERS, cuda_on_cpu, cuda_on_gpu

GPU = pytest.param("gpu", marks=pytest.mark.gpu)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    op = metafunc.module.__name__.rpartition("test_")[-1]
    only_cpu = metafunc.definition.get_closest_marker("only_cpu")
    if op in OPS and not only_cpu:
        usual = [] if metafunc.definition.get_closest_marker("slow_cuda") else [ORDERS[-1]]
        slow = [x for x in (ORDERS[-1], *ORDERS[:-1]) if x not in usual]
        params = [pytest.param(order, marks=pytest.mark.slow) for order in slow]
        is_of_errors = metafunc.function.__name__ == "test_errors"  # a GPU's end its process
        gpu = [] if is_of_errors else [GPU]
        metafunc.parametrize("kernels", ["cpu", *usual, *params, *gpu], indirect=True)


@pytest.hookimpl(tryfirst=True)  # before slow tests are left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In fp64 CUDA kernels do what they do in fp32, and take longest here."""
    for item in items:
        values = item.callspec.params if hasattr(item, "callspec") else {}
        if values.get("kernels", "cpu") != "cpu" and values.get("dtype") == torch.float64:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    order = getattr(request, "param", "cpu")
    if order == "cpu":
        yield order
    elif order == "gpu":
        with cuda_on_gpu():
            yield order
    elif MISSING:
        pytest.skip(f"CUDA kernels on the CPU: {MISSING}")
    else:
        with cuda_on_cpu(order):
            yield order
