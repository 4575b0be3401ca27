"""`run.deterministic`: on a GPU, too, the same bits every time."""

import contextlib
import os
from collections.abc import Iterator

import torch

from mixlora.errors import InputError

WORKSPACE, REPEATABLE = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Within it torch takes kernels that repeat to the bit; what has none is torch's error."""
    if not torch.cuda.is_initialized():  # cuBLAS reads it once
        os.environ.setdefault(WORKSPACE, REPEATABLE[0])
    found = os.environ.get(WORKSPACE)
    if found not in REPEATABLE:
        raise InputError(
            f"run.deterministic needs {WORKSPACE}={' or '.join(REPEATABLE)} in the environment "
            f"before the first work on a GPU, got {found}"
        )
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
