"""The reference switch: with MIXLORA_REFERENCE=1, or inside `with ops.reference():`, every public
op runs its `_ref`."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

_value = os.environ.get("MIXLORA_REFERENCE", "0")
if _value not in ("0", "1"):
    raise ValueError(f"MIXLORA_REFERENCE must be 0 or 1, got {_value!r}")

# A plain global, not a context variable: autograd runs backwards in threads of its own.
_reference = _value == "1"


def use_reference() -> bool:
    return _reference


@contextmanager
def reference() -> Iterator[None]:
    global _reference
    before, _reference = _reference, True
    try:
        yield
    finally:
        _reference = before
