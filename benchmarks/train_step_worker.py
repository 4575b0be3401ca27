"""This code, or `peft` on `transformers`, as a system of bench_train_step."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.worker import Trainee, serve


def make(options: dict[str, Any]) -> Trainee:
    return (peft_trainee if options["with"] == "peft" else our_trainee)(options)


@contextmanager
def made_there(options: dict[str, Any]) -> Iterator[None]:
    """A model that is made within is of the options' dtype, on their device from the beginning."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, options["dtype"]))
    try:
        with torch.device(options.get("device", "cpu")):
            yield
    finally:
        torch.set_default_dtype(before)


def our_trainee(options: dict[str, Any]) -> Trainee:
    import mixlora
    import models
    from benchmarks.modes import MODES
    from mixlora.adapters import trained_parameters

    with made_there(options):
        model = models.new({"model_type": "llama", **options["sizes"]}).train()
        tokens_BS = torch.tensor(options["tokens_BS"])
    if options["adapter"] is None:  # the floor: backward down to the embeddings
        parameters = [model.model["embed_tokens"].weight.requires_grad_()]
    else:
        mixlora.add_adapter(model, mixlora.AdapterConfig(**options["adapter"]))
        parameters = list(trained_parameters(model).values())
    if options["with"] in MODES:
        for block in model.model["layers"]:
            block.mlp.__class__ = MODES[options["with"]]

    def loss() -> Tensor:
        total, num_labels = model(tokens_BS, labels_BS=tokens_BS)
        return total / num_labels + model.router_loss()

    return Trainee(loss, parameters)


def peft_trainee(options: dict[str, Any]) -> Trainee:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    with made_there(options):
        hf_model = LlamaForCausalLM(LlamaConfig(**options["sizes"]))
        tokens_BS = torch.tensor(options["tokens_BS"])
    config = LoraConfig(**options["adapter"], target_modules="all-linear")
    model = get_peft_model(hf_model, config).train()
    parameters = [p for p in model.parameters() if p.requires_grad]

    def loss() -> Tensor:
        with autocast(options):
            return model(tokens_BS, labels=tokens_BS).loss

    return Trainee(loss, parameters)


def autocast(options: dict[str, Any]) -> torch.autocast:
    """peft's adapters are fp32 in a bf16 model; its users compute them in bf16 like this."""
    is_wanted = options["device"] != "cpu" and options["dtype"] == "bfloat16"
    return torch.autocast(options["device"], torch.bfloat16, enabled=is_wanted)


if __name__ == "__main__":
    serve(make)
