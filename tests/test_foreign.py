"""Adapters exchanged with the programs of others, each run in an environment of its own: pip's
`mixlora`, which has our import name, and MoE-PEFT. FOREIGN_PYTHON names the environment's python;
else tools/foreign.sh makes one."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import mixlora
import models
from mixlora.adapters import adapter_parameters
from tests.tiny import MIXLORA, add_filled, some_tokens, tiny_llama

pytestmark = pytest.mark.slow
TOKENS_BS = some_tokens(2, 17)


@pytest.fixture(scope="session")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    if "FOREIGN_PYTHON" in os.environ:
        return os.environ["FOREIGN_PYTHON"]
    folder = tmp_path_factory.mktemp("foreign")
    script = Path(__file__).parents[1] / "tools" / "foreign.sh"
    done = subprocess.run([script, folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"the environment cannot be made: {done.stderr.splitlines()[-1]}")
    return str(folder / "bin" / "python")


NO_DROPOUT = """
import json, sys, torch
torch.manual_seed(0)
torch.nn.functional.dropout = lambda x, *args, **kwargs: x
torch.nn.Dropout.forward = lambda self, x: x
arguments = json.loads(sys.argv[1])
tokens = torch.tensor(arguments["tokens"])
"""

PIP_MIXLORA = """
from mixlora import MixLoraModelForCausalLM
model, config = MixLoraModelForCausalLM.from_pretrained(
    arguments["adapter"], torch_dtype=torch.float32)
with torch.no_grad():
    torch.save(model(tokens).logits, "logits.pt")
"""

MOE_PEFT = """
import logging, os, moe_peft
logging.disable()
model = moe_peft.LLMModel.from_pretrained(
    arguments["base"], device="cpu", load_dtype=torch.float32)
if "config" in arguments:
    config = moe_peft.adapters.lora_config_factory(arguments["config"])
    config.adapter_name = "a"
    model.init_adapter(config)
    weights = model.get_adapter_weight_dict("a")
    with torch.no_grad():
        for weight in weights.values():
            weight.normal_(std=0.2)
    os.mkdir("theirs")
    torch.save(weights, "theirs/adapter_model.bin")
    values = config.export() | {"base_model_name_or_path": model.name_or_path_, "task_type": None}
    json.dump(values, open("theirs/adapter_config.json", "w"))
else:
    model.load_adapter(arguments["adapter"], "a")
rows = tokens.tolist()
with torch.no_grad():
    (output,) = model(moe_peft.LLMModelInput(
        batch_configs_=[moe_peft.LLMBatchConfig("a", 0, len(rows))], batch_tokens_=rows,
        batch_masks_=[[True] * len(row) for row in rows], inference_mode_=True))
torch.save(output.logits, "logits.pt")
"""


def their_logits(python: str, program: str, folder: Path, **arguments: object) -> Tensor:
    arguments = {"tokens": TOKENS_BS.tolist(), **arguments}
    done = subprocess.run(
        [python, "-c", NO_DROPOUT + program, json.dumps(arguments, default=str)],
        # MoE-PEFT's other mode drops out in evaluation too
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": "", "MOE_PEFT_EVALUATE_MODE": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(folder / "logits.pt")


@torch.no_grad()
def assert_same_model(logits_BSV: Tensor, model: nn.Module) -> None:
    model.eval()
    assert (logits_BSV - model(TOKENS_BS)).abs().max() <= 1e-5
    with mixlora.disable_adapters(model):
        assert (logits_BSV - model(TOKENS_BS)).abs().max() > 0.1


OURS = {
    "top 2 of 4": {},
    "attention and down": {"target_modules": ["q_proj", "o_proj", "down_proj"]},
    "top 3 of 5, relu": {"num_experts": 5, "top_k": 3, "act_fn": "relu"},
    "gate and up": {"target_modules": ["gate_proj", "up_proj"], "lora_dropout": 0.1},
}


@pytest.mark.parametrize("program", [PIP_MIXLORA, MOE_PEFT], ids=["pip mixlora", "MoE-PEFT"])
@pytest.mark.parametrize("kind", OURS.values(), ids=OURS)
def test_what_is_saved_here_loads_there(python: str, program: str, kind: dict, tmp_path) -> None:
    base, _ = tiny_llama(tmp_path / "base")
    model = models.load(base)
    add_filled(model, **{**MIXLORA, **kind})
    mixlora.save_adapter(model, tmp_path / "adapter")
    folders = {"base": base, "adapter": tmp_path / "adapter"}
    assert_same_model(their_logits(python, program, tmp_path, **folders), model)


TARGETS = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
THEIRS = {
    "LoRA": {"peft_type": "LORA"},
    "mixlora": {"routing_strategy": "mixlora", "top_k": 2},
    "mixlora, some projections": {
        "routing_strategy": "mixlora",
        "top_k": 3,
        "targets": ["q_proj", "up_proj", "down_proj"],
    },
    "expert_lora": {
        "routing_strategy": "mixlora",
        "top_k": 2,
        "expert_lora": {"r": 2, "lora_alpha": 9},
    },
    "mixlora-dynamic": {"routing_strategy": "mixlora-dynamic", "top_p": 0.6, "temperature": 0.5},
    "mola": {"routing_strategy": "mola", "top_k": 2},
    "loramoe": {"routing_strategy": "loramoe"},
}


@pytest.mark.parametrize("kind", THEIRS.values(), ids=THEIRS)
def test_what_moe_peft_saves_loads_here(python: str, kind: dict, tmp_path) -> None:
    base, _ = tiny_llama(tmp_path / "base")
    on = kind.get("targets", TARGETS)
    config = {"r": 4, "lora_alpha": 6, "lora_dropout": 0.05, "bias": "none", "num_experts": 4}
    config |= {k: v for k, v in kind.items() if k != "targets"}
    config["target_modules"] = {name: name in on for name in TARGETS}
    logits_BSV = their_logits(python, MOE_PEFT, tmp_path, base=base, config=config)
    model = models.load(base)
    mixlora.load_adapter(model, tmp_path / "theirs")
    assert adapter_parameters(model)
    assert_same_model(logits_BSV, model)
