"""Cosines and sines of every kind of RoPE against those of `transformers`."""

import pytest
import torch

from models.rotary import ROPES, rotary
from tests.numerics import assert_close

LENGTH = 300
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"factor": 5.0, "original_max_position_embeddings": 64}
CASES: dict[str, tuple[str, dict]] = {
    "default": ("default", {}),
    "other theta": ("default", {"rope_theta": 5e5}),
    "linear": ("linear", {"factor": 3.0}),
    "dynamic": ("dynamic", {"factor": 3.0}),
    "dynamic, other factor": ("dynamic", {"factor": 1.5, "rope_theta": 700.0}),
    "llama3": ("llama3", {**LLAMA3, "factor": 7.0}),
    "llama3, much kept": ("llama3", {**LLAMA3, "factor": 3.0, "high_freq_factor": 1.5}),
    "YaRN": ("yarn", YARN),
    "YaRN that squeezes nothing": ("yarn", {**YARN, "factor": 1.0}),
    "YaRN with a long ramp": ("yarn", {**YARN, "beta_fast": 9, "beta_slow": 0.01}),
    "YaRN with a real ramp": ("yarn", {**YARN, "beta_fast": 9, "truncate": False}),
    "YaRN with a ramp past half": ("yarn", {**YARN, "beta_fast": 9, "beta_slow": 5e-4}),
    "YaRN with a ramp past the end": ("yarn", {**YARN, "beta_fast": 9, "beta_slow": 1e-9}),
    "YaRN with a step": ("yarn", {**YARN, "beta_fast": 3, "beta_slow": 3, "truncate": False}),
    "YaRN with a step at 0": ("yarn", {**YARN, "beta_fast": 500, "beta_slow": 400}),
    "YaRN, beta 0 is the default": ("yarn", {**YARN, "beta_fast": 0, "beta_slow": 0}),
    "YaRN, attention factor": ("yarn", {**YARN, "attention_factor": 1.7}),
    "YaRN, mscales": ("yarn", {**YARN, "mscale": 2.0, "mscale_all_dim": 0.5}),
    "YaRN, one mscale is none": ("yarn", {**YARN, "mscale": 2.0, "mscale_all_dim": 0.0}),
}


@pytest.mark.parametrize("head_dim", [12, 64])
@pytest.mark.parametrize("kind, fields", CASES.values(), ids=CASES)
def test_rotary(kind: str, fields: dict, head_dim: int) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    values = {"rope_theta": 10000.0, **fields}
    parameters = {"rope_type": kind, **values}
    config = LlamaConfig(head_dim=head_dim, max_position_embeddings=64, rope_parameters=parameters)
    positions_BS = torch.arange(LENGTH)[None]
    cos, sin = LlamaRotaryEmbedding(config)(torch.ones(1), positions_BS)

    own = {"max_position_embeddings": 64} if kind == "dynamic" else {}
    table = rotary(ROPES[kind](**values, **own), positions_BS, None, head_dim, torch.float32)
    assert table.shape == (2, 1, 1, LENGTH, head_dim)
    assert_close(table[:, :, 0], torch.stack([cos, sin]), rel=1e-6)
