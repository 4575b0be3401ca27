"""How a folder becomes a model, and what is said of one that cannot."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import models
from mixlora.errors import InputError
from mixlora.files import TensorFile
from models.rotary import DynamicRope, LinearRope, Llama3Rope, Rope, YarnRope
from tests.tiny import FAMILIES, SIZES, some_tokens, tiny_llama


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("whole"))[0]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("sharded"), shard_size="10KB")[0]


Q = "model.layers.0.self_attn.q_proj.weight"
GATE = "model.layers.1.mlp.gate_proj.weight"
NORM = "model.norm.weight"


def error_of(folder: Path) -> str:
    with pytest.raises(InputError) as error:
        models.load(folder)
    said = str(error.value)
    assert "\n" not in said
    return said


def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def edit_tensors(path: Path, edit) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file({name: x.contiguous() for name, x in tensors.items()}, path)


def shard_of(folder: Path, tensor: str) -> Path:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / index["weight_map"][tensor]


def test_missing_shard(sharded, tmp_path) -> None:
    folder = copy(sharded, tmp_path)
    shard = shard_of(folder, GATE)
    shard.unlink()
    said = error_of(folder)
    assert said.endswith(f"names shards that are not there: {shard.name}")


def test_shard_lacks_an_indexed_tensor(sharded, tmp_path) -> None:
    folder = copy(sharded, tmp_path)
    shard = shard_of(folder, GATE)
    edit_tensors(shard, lambda tensors: tensors.pop(GATE))
    said = error_of(folder)
    assert said.startswith(f"{shard}: 1 missing, 0 unexpected, 0 misshaped tensors")
    assert f"missing: {GATE}" in said


def test_shard_holds_a_tensor_that_is_not_indexed(sharded, tmp_path) -> None:
    folder = copy(sharded, tmp_path)
    shard = shard_of(folder, GATE)
    edit_tensors(shard, lambda tensors: tensors.update(surplus=torch.ones(2)))
    said = error_of(folder)
    assert said.startswith(f"{shard}: 0 missing, 1 unexpected, 0 misshaped tensors")
    assert "unexpected: surplus" in said


def test_tensor_in_two_shards(sharded, tmp_path) -> None:
    folder = copy(sharded, tmp_path)
    other = shard_of(folder, Q)
    assert other != shard_of(folder, GATE)
    edit_tensors(other, lambda tensors: tensors.update({GATE: torch.ones(48, 32)}))
    said = error_of(folder)
    assert said.startswith(f"{other}: 0 missing, 1 unexpected, 0 misshaped tensors")
    assert f"unexpected: {GATE}" in said


@pytest.mark.parametrize(
    "place", ["../{}", "/tmp/{}", "sub/{}", "..", ".", "", "pytorch_model.bin", "{}\0"]
)
def test_index_that_leaves_the_folder(sharded, tmp_path, place: str) -> None:
    folder = copy(sharded, tmp_path)
    shard = shard_of(folder, Q)
    for target in (tmp_path, folder / "sub"):
        target.mkdir(exist_ok=True)
        shutil.copy(shard, target)
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    place = place.format(shard.name)
    moved = {name: place if file == shard.name else file for name, file in weight_map.items()}
    edit_json(index, weight_map=moved)
    assert error_of(folder) == f"{index}: {place!r} is no safetensors file of this folder"


@pytest.mark.parametrize("weight_map", [None, [], {"a": 1}, "model.safetensors"])
def test_index_without_a_map(sharded, tmp_path, weight_map: object) -> None:
    folder = copy(sharded, tmp_path)
    edit_json(folder / "model.safetensors.index.json", weight_map=weight_map)
    assert "weight_map must map tensors to files" in error_of(folder)


def test_transposed_tensor(whole, tmp_path) -> None:
    folder = copy(whole, tmp_path)
    edit_tensors(folder / "model.safetensors", lambda x: x.update({GATE: x[GATE].T}))
    said = error_of(folder)
    assert f"0 missing, 0 unexpected, 1 misshaped tensors; misshaped: {GATE}" in said
    assert f"{GATE} must be [48, 32], got [32, 48]" in said


def test_each_tensor_that_is_not_as_it_should(tmp_path) -> None:
    """T20: absent, under another name, turned. (No matrix here is square.)"""
    folder, _ = tiny_llama(tmp_path, head_dim=10, attention_bias=True, num_hidden_layers=1)
    path = folder / "model.safetensors"
    tensors = load_file(path)

    def said(**changed: Tensor) -> str:
        save_file({**tensors, **changed}, path)
        return error_of(folder)

    for name, x in list(tensors.items()):
        if x.dim() == 2:
            shapes = f"{name} must be {[*x.shape]}, got {[*x.T.shape]}; likely cause"
            wanted = f": 0 missing, 0 unexpected, 1 misshaped tensors; misshaped: {shapes}"
            assert wanted in said(**{name: x.T.contiguous()})
        del tensors[name]
        assert f": 1 missing, 0 unexpected, 0 misshaped tensors; missing: {name}" in said()
        assert f"tensors; missing: {name}; unexpected: x.{name}" in said(**{f"x.{name}": x})
        tensors[name] = x


def test_all_wrong_tensors_are_one_error(whole, tmp_path) -> None:
    folder = copy(whole, tmp_path)

    def edit(tensors: dict[str, Tensor]) -> None:
        del tensors[Q], tensors[NORM]
        tensors.update({"zzz.weight": torch.ones(3), GATE: torch.ones(48, 31)})

    edit_tensors(folder / "model.safetensors", edit)
    said = error_of(folder)
    assert "2 missing, 1 unexpected, 1 misshaped tensors" in said
    assert f"missing: {Q}, {NORM}; unexpected: zzz.weight; misshaped: {GATE} must be" in said


def test_untied_checkpoint_without_lm_head(whole, tmp_path) -> None:
    folder = copy(whole, tmp_path)
    edit_tensors(folder / "model.safetensors", lambda tensors: tensors.pop("lm_head.weight"))
    assert "likely cause: config.json lacks tie_word_embeddings: true" in error_of(folder)


@torch.no_grad()
def test_tensors_that_are_passed_over(whole, tmp_path) -> None:
    folder = copy(whole, tmp_path)
    edit_json(folder / "config.json", tie_word_embeddings=True)  # and lm_head.weight is stored
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    edit_tensors(folder / "model.safetensors", lambda tensors: tensors.update(buffer))
    model = models.load(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, models.load(whole).model.embed_tokens.weight)


@pytest.mark.parametrize("length", [0, 4, 8, 100, 5000, -1])
def test_truncated_file(whole, tmp_path, length: int) -> None:
    path = copy(whole, tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    assert error_of(path.parent).startswith(f"{path}: not a whole safetensors file: ")


def test_truncated_shard(sharded, tmp_path, monkeypatch) -> None:
    """T21: whichever it is, no tensor is read before."""
    monkeypatch.setattr(TensorFile, "__getitem__", None)
    folder = copy(sharded, tmp_path)
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    for path in shards:
        content = path.read_bytes()
        path.write_bytes(content[:-1])
        assert error_of(folder).startswith(f"{path}: not a whole safetensors file: ")
        path.write_bytes(content)


@pytest.mark.parametrize("lie", [0, 7, 100, 10**6, 2**40, 2**63, 2**64 - 1])
def test_header_that_lies_about_its_length(whole, tmp_path, lie: int) -> None:
    path = copy(whole, tmp_path) / "model.safetensors"
    path.write_bytes(lie.to_bytes(8, "little") + path.read_bytes()[8:])
    assert error_of(path.parent).startswith(f"{path}: not a whole safetensors file: ")


def test_bytes_behind_the_tensors(whole, tmp_path) -> None:
    path = copy(whole, tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"surplus")
    assert error_of(path.parent).startswith(f"{path}: not a whole safetensors file: ")


def test_no_weights(whole, tmp_path) -> None:
    path = copy(whole, tmp_path) / "model.safetensors"
    path.unlink()
    assert error_of(path.parent) == f"{path}: no such file"


def test_no_folder(tmp_path) -> None:
    assert error_of(tmp_path / "none") == f"model {tmp_path}/none: no such folder"


LINEAR = {"type": "linear", "factor": 2.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096}


@pytest.mark.parametrize(
    "values, message",
    [
        ({"model_type": "lama"}, "model_type 'lama' is not supported (did you mean 'llama'?)"),
        ({"model_type": "mistal"}, "(did you mean 'mistral'?)"),
        (
            {"model_type": "bert"},
            "model_type 'bert' is not supported (known: gemma, gemma2, llama, mistral)",
        ),
        ({"model_type": None}, "model_type None is not supported"),
        ({"model_type": ["llama"]}, "model_type ['llama'] is not supported"),
        ({"hidden_act": "swish_of_another_kind"}, "hidden_act"),
        ({"hidden_size": "32"}, "hidden_size must be int, got '32'"),
        ({"hidden_size": 32.0}, "hidden_size must be int, got 32.0"),
        ({"hidden_size": 0}, "hidden_size must be positive, got 0"),
        ({"hidden_size": None}, "hidden_size must be int, got None"),
        ({"head_dim": 7}, "head_dim must be even for rotary embeddings, got 7"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 must be a multiple of num_key_value"),
        ({"head_dim": None, "num_attention_heads": 6}, "hidden_size 32 must be a multiple of num"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be bool, got 1"),
        ({"sliding_window": 128}, "sliding_window = 128 is not supported for llama"),
        ({"rms_norm_epsilon": 0.1}, "is not supported for llama (did you mean 'rms_norm_eps'?)"),
        ({"rope_interleaved": True}, "rope_interleaved = True is not supported for llama"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1, got 0.5"),
        ({"rope_scaling": LINEAR}, "rope_scaling and rope_parameters differ, one must go"),
        ({"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4} is not support"),
    ],
)
def test_wrong_config(whole, tmp_path, values: dict, message: str) -> None:
    folder = copy(whole, tmp_path)
    edit_json(folder / "config.json", **values)
    said = error_of(folder)
    assert said.startswith(f"{folder / 'config.json'}: ")
    assert message in said


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff", '{"model_type": "llama"}'])
def test_config_that_is_none(whole, tmp_path, text: str) -> None:
    path = copy(whole, tmp_path) / "config.json"
    path.write_bytes(text.encode("latin-1"))
    assert error_of(path.parent).startswith(str(path))


def test_no_memory_for_the_weights(whole, monkeypatch) -> None:
    """The allocator's own words, and no other failure is taken for one."""
    with pytest.raises(RuntimeError) as refused:
        torch.empty(1 << 58)
    failure: RuntimeError = refused.value

    def fail(*_: object) -> Tensor:
        raise failure

    monkeypatch.setattr(TensorFile, "__getitem__", fail)
    said = error_of(whole)
    assert f"in loading {whole}: its weights take 0.000 GiB" in said
    assert "DefaultCPUAllocator" in said
    failure = RuntimeError("a kernel failed")
    with pytest.raises(RuntimeError, match="a kernel failed"):
        models.load(whole)


def test_no_config(whole, tmp_path) -> None:
    path = copy(whole, tmp_path) / "config.json"
    path.unlink()
    assert error_of(path.parent) == f"{path}: no such file"


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    "rope, message",
    [
        ("linear", "{key} must be a mapping, got 'linear'"),
        ({"type": "liner"}, "{key} of type 'liner' is not supported (did you mean 'linear'?)"),
        (
            {"rope_type": "longrope"},
            "{key} of type 'longrope' is not supported (known: default, dynamic, linear, llama3, "
            "yarn)",
        ),
        ({"rope_type": ["linear"]}, "{key} of type ['linear'] is not supported"),
        ({"rope_type": "linear"}, "{key} of type 'linear': missing factor"),
        ({"factor": 2.0}, "{key} of type 'default': factor is not supported"),
        (
            {**LINEAR, "original_max_position_embeddings": 64},
            "{key} of type 'linear': original_max_position_embeddings is not supported",
        ),
        ({**LINEAR, "factor": "2"}, "{key} of type 'linear': factor must be float, got '2'"),
        ({**LINEAR, "factor": None}, "factor must be float, got None"),
        ({**LINEAR, "factor": 0.0}, "factor must be > 0, got 0.0"),
        ({**LINEAR, "factor": float("nan")}, "factor must be > 0, got nan"),
        ({**LINEAR, "rope_theta": 1.0}, "rope_theta must be > 1, got 1.0"),
        (
            {"rope_type": "dynamic", "factor": 2.0},
            "type 'dynamic': missing max_position_embeddings",
        ),
        ({"rope_type": "yarn"}, "'yarn': missing factor, original_max_position_embeddings"),
        (
            {**YARN, "beta_fats": 3},
            "{key} of type 'yarn': beta_fats is not supported (did you mean 'beta_fast'?)",
        ),
        ({**YARN, "truncate": 1}, "truncate must be bool, got 1"),
        ({**YARN, "beta_slow": -1}, "{key} of type 'yarn': beta_slow must be >= 0, got -1"),
        ({**YARN, "partial_rotary_factor": 0.5}, "partial_rotary_factor is not supported"),
        (
            {key: value for key, value in LLAMA3.items() if "freq" not in key},
            "{key} of type 'llama3': missing low_freq_factor, high_freq_factor",
        ),
        ({**LLAMA3, "low_freq_factor": 4}, "high_freq_factor must be greater than low_freq_factor"),
    ],
)
def test_wrong_rope(key: str, rope: object, message: str) -> None:
    values = {"model_type": "llama", **SIZES, key: rope}
    del values["max_position_embeddings"]
    said = error_of_config(values)
    assert said.startswith("config: ")
    assert message.format(key=key) in said


def error_of_config(values: dict) -> str:
    with pytest.raises(InputError) as error:
        models.new(values)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "kind, values, message",
    [
        ("mistral", {"sliding_window": 0}, "sliding_window must be positive, got 0"),
        ("mistral", {"sliding_window": 4.0}, "sliding_window must be int or NoneType, got 4.0"),
        ("mistral", {"attention_bias": True}, "attention_bias = True is not supported for mistral"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ("gemma", {"sliding_window": 8}, "sliding_window = 8 is not supported for gemma"),
        ("gemma", {"hidden_activation": "gelu_tanh"}, "did you mean 'gelu_pytorch_tanh'?"),
        (
            "gemma",
            {"hidden_act": "relu", "hidden_activation": "silu"},
            "hidden_act 'relu' and hidden_activation 'silu' differ",
        ),
        ("gemma2", {"layer_types": ["sliding_attention"]}, "layer_types must name 3 layers, got 1"),
        (
            "gemma2",
            {"layer_types": ["sliding_atention"] * 3},
            "layer_types: 'sliding_atention' is not supported (did you mean 'sliding_attention'?)",
        ),
        ("gemma2", {"sliding_window": None}, "sliding_window must be int for the layers that slid"),
        ("gemma2", {"sliding_window_size": 9}, "sliding_window 8 and sliding_window_size 9 differ"),
        ("gemma2", {"attn_logit_softcapping": 0.0}, "attn_logit_softcapping must be positive"),
        ("gemma2", {"query_pre_attn_scalar": -1.0}, "query_pre_attn_scalar must be positive"),
    ],
)
def test_wrong_config_of_a_family(kind: str, values: dict, message: str) -> None:
    said = error_of_config({"model_type": kind, **SIZES, **FAMILIES[kind], **values})
    assert said.startswith("config: ")
    assert message in said


def config_of(kind: str, **values: object) -> object:
    return models.new({"model_type": kind, **SIZES, **FAMILIES[kind], **values}).config


@pytest.mark.parametrize(
    "values, rope",
    [
        ({}, Rope()),
        ({"rope_theta": 500}, Rope(rope_theta=500)),
        ({"rope_theta": None, "rope_scaling": None}, Rope()),
        ({"rope_theta": 5.0, "rope_parameters": {"rope_theta": 9.0}}, Rope(rope_theta=9.0)),
        ({"rope_parameters": {"rope_theta": 9.0, "rope_type": "default"}}, Rope(rope_theta=9.0)),
        ({"rope_theta": 9.0, "rope_scaling": LINEAR}, LinearRope(rope_theta=9.0, factor=2.0)),
        ({"rope_scaling": LINEAR, "rope_parameters": LINEAR}, LinearRope(factor=2.0)),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2}},
            DynamicRope(factor=2, max_position_embeddings=128),
        ),
        (
            {"rope_scaling": {**YARN, "finetuned": True, "partial_rotary_factor": 1.0}},
            YarnRope(factor=16.0, original_max_position_embeddings=4096),
        ),
    ],
)
def test_spellings_of_rope(values: dict, rope: Rope) -> None:
    assert config_of("llama", **values).rope_parameters == rope


def test_spellings_of_gemmas_activation() -> None:
    """`gelu` of the first checkpoints stands for its tanh form."""
    tanh = "gelu_pytorch_tanh"
    for kind in ("gemma", "gemma2"):
        assert config_of(kind).hidden_act == tanh
        assert config_of(kind, hidden_act="gelu").hidden_act == tanh
        assert config_of(kind, hidden_act="gelu", hidden_activation=tanh).hidden_act == tanh
        assert config_of(kind, hidden_act=None, hidden_activation="silu").hidden_act == "silu"


# What published checkpoints say, but for their sizes.
PUBLISHED: dict[str, tuple[dict, Rope]] = {
    "TinyLlama": (
        {"model_type": "llama", "pretraining_tp": 1, "rope_scaling": None, "rope_theta": 10000.0},
        Rope(),
    ),
    "LLaMA 1": ({"model_type": "llama", "max_sequence_length": 2048, "pad_token_id": 0}, Rope()),
    "Yi": (
        {
            "model_type": "llama",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "hidden_dropout_prob": 0.0,
            "rope_scaling": None,
            "rope_theta": 5000000.0,
        },
        Rope(rope_theta=5e6),
    ),
    "SmolLM2": (
        {
            "model_type": "llama",
            "is_llama_config": True,
            "rope_interleaved": False,
            "rope_scaling": None,
            "rope_theta": 100000,
            "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}},
        },
        Rope(rope_theta=100000),
    ),
    "LLaMA 3.1": (
        {"model_type": "llama", "rope_scaling": LLAMA3, "rope_theta": 500000.0},
        Llama3Rope(
            rope_theta=5e5,
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
    ),
    "Mistral v0.3": (
        {"model_type": "mistral", "sliding_window": None, "rope_theta": 1000000.0},
        Rope(rope_theta=1e6),
    ),
    "Gemma 2": (
        {
            "model_type": "gemma2",
            "cache_implementation": "hybrid",
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "sliding_window_size": 4096,
        },
        Rope(),
    ),
}


@pytest.mark.parametrize("values, rope", PUBLISHED.values(), ids=PUBLISHED)
@torch.no_grad()
def test_configs_of_published_checkpoints(values: dict, rope: Rope) -> None:
    model = models.new({**SIZES, "use_cache": True, "torch_dtype": "bfloat16", **values})
    assert model.config.rope_parameters == rope
    assert model(some_tokens(1, 5)).isfinite().all()


def test_defaults_of_the_families() -> None:
    """What config.json may leave out is what `transformers` takes."""
    import transformers  # slow

    for kind in FAMILIES:
        wanted = transformers.AutoConfig.for_model(kind, **SIZES)
        config = models.new({"model_type": kind, **SIZES}).config
        own = {"hidden_act", "hidden_activation", "sliding_window_size", "rope_parameters"}
        for name in vars(config).keys() - own:
            value = getattr(config, name)
            value = list(value) if isinstance(value, tuple) else value
            assert value == getattr(wanted, name), (kind, name)
        acts = getattr(wanted, "hidden_activation", None), getattr(wanted, "hidden_act", None)
        assert config.hidden_act in acts
        assert config.rope_parameters.rope_theta == wanted.rope_parameters["rope_theta"]
