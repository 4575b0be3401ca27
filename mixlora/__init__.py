"""Fine-tuning of large language models with mixtures of LoRA experts."""

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
