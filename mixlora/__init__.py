"""Fine-tuning of large language models with mixtures of LoRA experts."""

import importlib.metadata
import warnings

from mixlora.adapters import (
    AdapterConfig,
    add_adapter,
    disable_adapters,
    load_adapter,
    print_trainable_parameters,
    remove_adapter,
    save_adapter,
)

__version__ = "0.1.0"
__all__ = [
    "AdapterConfig",
    "add_adapter",
    "disable_adapters",
    "load_adapter",
    "print_trainable_parameters",
    "remove_adapter",
    "save_adapter",
]

if any(importlib.metadata.distributions(name="mixlora")):
    warnings.warn(
        "the package 'mixlora' of PyPI is installed too and has the same import name; "
        f"this is mixlora-research, from {__path__[0]}",
        stacklevel=2,
    )
