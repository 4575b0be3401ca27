"""What is written as Mixtral computes in `transformers` what the mixture computes here."""

from pathlib import Path

import pytest
import torch

import mixlora
import models
from mixlora.errors import InputError
from mixlora.files import read_json
from tests.numerics import assert_close
from tests.tiny import MIXLORA, SIZES, add_filled, some_tokens, tiny_checkpoint

SETTINGS = {
    "all projections": {},
    "top 1, two projections": {"top_k": 1, "target_modules": ["q_proj", "down_proj", "up_proj"]},
    "MixDoRA": {"use_dora": True},
    "rsLoRA": {"use_rslora": True},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_transformers_computes_the_same(kind: str, settings: dict, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, MixtralForCausalLM

    model = models.load(tiny_checkpoint(kind, tmp_path / "base", tie_word_embeddings=True)[0])
    add_filled(model, **{**MIXLORA, **settings})
    models.save_mixtral(model, tmp_path / "mixtral")
    other, told = AutoModelForCausalLM.from_pretrained(
        tmp_path / "mixtral", dtype=torch.float32, output_loading_info=True
    )
    assert isinstance(other, MixtralForCausalLM)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    tokens_BS = some_tokens(2, 40)
    with torch.no_grad():
        assert_close(other.eval()(tokens_BS).logits, model(tokens_BS), rel=1e-5)


def test_rope_and_half_precision_go_along(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
    folder, _ = tiny_checkpoint("llama", tmp_path / "base", rope_parameters=rope)
    model = models.load(folder)
    add_filled(model, **MIXLORA)
    models.save_mixtral(model, tmp_path / "mixtral")
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "mixtral", dtype=torch.float32)
    tokens_BS = some_tokens(1, 40)
    with torch.no_grad():
        assert_close(other.eval()(tokens_BS).logits, model(tokens_BS), rel=1e-5)

    half = models.load(folder, dtype=torch.bfloat16)
    add_filled(half, **MIXLORA)
    models.save_mixtral(half, tmp_path / "half")
    assert read_json(tmp_path / "half" / "config.json")["dtype"] == "bfloat16"
    index = read_json(tmp_path / "half" / "model.safetensors.index.json")
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
    assert other.dtype == torch.bfloat16
    size = sum(x.nbytes for x in other.state_dict().values())
    assert index["metadata"]["total_size"] == size


@pytest.mark.parametrize(
    "kind, base, settings, reason",
    [
        ("gemma", {}, MIXLORA, "its base is of model_type 'gemma', not llama or mistral"),
        ("llama", {}, {}, "'default' is no mixture in each of its layers"),
        ("llama", {"mlp_bias": True}, MIXLORA, "its projections have biases"),
        ("llama", {"hidden_act": "gelu"}, MIXLORA, "its activation is not silu"),
        (
            "llama",
            {},
            {**MIXLORA, "routing_strategy": "mixlora-dynamic", "top_k": None, "top_p": 0.8},
            "its router is not mixlora's, the top K renormalised",
        ),
    ],
)
def test_what_no_mixtral_computes(
    kind: str, base: dict, settings: dict, reason: str, tmp_path: Path
) -> None:
    model = models.load(tiny_checkpoint(kind, tmp_path / "base", **base)[0])
    add_filled(model, **{key: value for key, value in settings.items() if value is not None})
    with pytest.raises(InputError) as error:
        models.save_mixtral(model, tmp_path / "mixtral")
    wanted = f"save_mixtral: no Mixtral computes what this model does: {reason}"
    assert str(error.value) == wanted
    assert not (tmp_path / "mixtral").exists()


def test_an_adapter_that_is_not_there(tmp_path: Path) -> None:
    model = models.load(tiny_checkpoint("llama", tmp_path / "base")[0])
    mixlora.add_adapter(model, mixlora.AdapterConfig(**MIXLORA), "alpaca")
    with pytest.raises(InputError, match="no adapter named 'alpca' .did you mean 'alpaca'"):
        models.save_mixtral(model, tmp_path / "mixtral", "alpca")


def test_a_model_without_a_checkpoint(tmp_path: Path) -> None:
    model = models.new({"model_type": "llama", **SIZES})
    mixlora.add_adapter(model, mixlora.AdapterConfig(**MIXLORA))
    with pytest.raises(InputError, match="^save_mixtral: the model was not loaded"):
        models.save_mixtral(model, tmp_path / "mixtral")
