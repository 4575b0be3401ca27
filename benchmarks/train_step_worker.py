"""This code, or `peft` on `transformers`, as a system of bench_train_step."""

from typing import Any

import torch
from torch import Tensor

from benchmarks.worker import Trainee, serve


def make(options: dict[str, Any]) -> Trainee:
    return (peft_trainee if options["with"] == "peft" else our_trainee)(options)


def our_trainee(options: dict[str, Any]) -> Trainee:
    import mixlora
    import models
    from benchmarks.modes import MODES
    from mixlora.adapters import trained_parameters

    sizes = {"model_type": "llama", **options["sizes"]}
    model = models.new(sizes).to(getattr(torch, options["dtype"])).train()
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

    hf_model = LlamaForCausalLM(LlamaConfig(**options["sizes"]))
    hf_model = hf_model.to(getattr(torch, options["dtype"]))
    config = LoraConfig(**options["adapter"], target_modules="all-linear")
    model = get_peft_model(hf_model, config).train()
    tokens_BS = torch.tensor(options["tokens_BS"])
    parameters = [p for p in model.parameters() if p.requires_grad]
    return Trainee(lambda: model(tokens_BS, labels=tokens_BS).loss, parameters)


if __name__ == "__main__":
    serve(make)
