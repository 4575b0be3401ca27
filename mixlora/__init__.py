"""Fine-tuning of large language models with mixtures of LoRA experts."""

import importlib.metadata
import warnings

from mixlora.adapter_config import AdapterConfig
from mixlora.adapter_files import load_adapter, save_adapter
from mixlora.adapters import (
    add_adapter,
    disable_adapters,
    merge,
    print_trainable_parameters,
    remove_adapter,
)

__version__ = "0.1.0"
__all__ = [
    "AdapterConfig",
    "add_adapter",
    "disable_adapters",
    "load_adapter",
    "merge",
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
