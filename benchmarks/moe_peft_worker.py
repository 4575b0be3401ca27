"""MoE-PEFT as a system of bench_train_step, in the environment that tools/foreign.sh makes,
since it needs an older transformers.

With MOE_PEFT_EVALUATE_MODE set it runs whole experts, else it shares the products of W1 and W3.
"""

import logging
import tempfile
from typing import Any

import moe_peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.worker import Trainee, serve

NAME = "adapter"
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make(options: dict[str, Any]) -> Trainee:
    logging.disable()
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(LlamaConfig(**options["sizes"])).save_pretrained(folder)
        dtype = getattr(torch, options["dtype"])
        model = moe_peft.LLMModel.from_pretrained(folder, device="cpu", load_dtype=dtype)
    model.train()
    config = {"bias": "none", "task_type": "CAUSAL_LM", **options["adapter"]}
    config |= {"target_modules": dict.fromkeys(TARGETS, True)}
    model.init_adapter(moe_peft.adapter_factory("MIXLORA", NAME, **config))
    parameters = [p for p in model.get_adapter_weight_dict(NAME).values() if p.requires_grad]
    tokens = options["tokens_BS"]

    def loss() -> torch.Tensor:
        inputs = moe_peft.LLMModelInput(
            batch_configs_=[moe_peft.LLMBatchConfig(NAME, 0, len(tokens))],
            batch_tokens_=tokens,
            batch_labels_=tokens,
            batch_masks_=[[True] * len(row) for row in tokens],
        )
        (output,) = model(inputs)
        return output.loss + output.aux_loss

    return Trainee(loss, parameters)


if __name__ == "__main__":
    serve(make)
