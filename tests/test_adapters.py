import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mixlora
from mixlora import AdapterConfig
from mixlora.adapter_config import LoraSettings
from mixlora.adapter_files import CONFIG_FILE, PICKLED_FILE, TENSOR_FILE
from mixlora.adapters import adapter_parameters, freeze_but
from mixlora.errors import InputError
from mixlora.optim import OptimConfig, make_optimizer, set_lr
from tests.numerics import assert_close
from tests.tiny import MIXLORA, SIZES, add_filled, some_tokens, tiny_model

INSTRUCT = Path(__file__).resolve().parents[2] / "shared/data/instruct"
TOKENS_BS = some_tokens(2, 9)
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
SWITCH = {"routing_strategy": "mixlora-switch", "num_experts": 4}
MLP = ["gate_proj", "up_proj", "down_proj"]

KINDS = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True, "lora_alpha": 1.5, "r": 5},
    "LoRA of two projections": {"target_modules": ["v_proj", "down_proj"]},
    "DoRA": {"use_dora": True, "use_rslora": True, "lora_alpha": 1.5},
    "MixLoRA": MIXLORA,
    "MixDoRA": {**MIXLORA, "use_dora": True},
    "expert_lora": {**MIXLORA, "expert_lora": LoraSettings(r=2, lora_alpha=3.0, use_dora=True)},
    "dynamic": {"routing_strategy": "mixlora-dynamic", "num_experts": 4, "top_p": 0.7},
    "switch": {"routing_strategy": "mixlora-switch", "num_experts": 4, "expert_capacity": 60},
    "LoRAMoE": {"routing_strategy": "loramoe", "num_experts": 4},
    "MoLA": {"routing_strategy": "mola", "num_experts": 4, "router_loss": True},
    "MixLoRA of two projections": {**MIXLORA, "target_modules": ["q_proj", "up_proj"]},
    "MixLoRA of attention alone": {**MIXLORA, "target_modules": ["k_proj"]},
    "MiLoRA": {"routing_strategy": "milora", "top_k": 7},
    "MiDoRA": {"routing_strategy": "milora", "top_k": 7, "use_dora": True, "router_act": "relu"},
    "MiLoRA of two projections": {
        "routing_strategy": "milora",
        "target_modules": r".*\.0\.self_attn\.[qv]_proj",
        "pooler": "mean",
        "top_k": 1,
    },
    "MixLoRA with another activation": {**MIXLORA, "act_fn": "relu", "use_rslora": True},
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def filled(kind: dict, name: str = "default") -> nn.Module:
    model = tiny_model()
    add_filled(model, name, **kind)
    return model


@torch.no_grad()
def logits_of(model: nn.Module) -> Tensor:
    return model(TOKENS_BS)


def error_of(function, *arguments) -> str:
    with pytest.raises(InputError) as error:
        function(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.skipif(not INSTRUCT.is_dir(), reason="../shared/data/instruct is not there")
def test_published_configs() -> None:
    paths = [p for p in INSTRUCT.glob("*.adapter_config.json") if "legacy" not in p.name]
    assert len(paths) == 2
    for path in paths:
        values = json.loads(path.read_text())
        config = AdapterConfig.from_dict(values)
        assert config.to_dict() == values
        assert config.num_experts == 8 and config.routing_strategy == "mixlora"


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"r": 3, "lora_alpha": 6.5, "lora_dropout": 0.25, "use_rslora": True},
        {"target_modules": ["q_proj"], "lora_init": "gaussian", "loraplus_lr_ratio": 16.0},
        {"task_type": "QUESTION_ANS", "base_model_name_or_path": "some/model"},
        {"routing_strategy": "mixlora"},
        {"routing_strategy": "mixlora", "num_experts": 3, "top_k": 3, "act_fn": "gelu"},
        {"routing_strategy": "mixlora", "router_loss": False, "router_aux_loss_coef": 0.0},
        {"routing_strategy": "mixlora", "router_loss_scope": "per_layer", "jitter_noise": 0.1},
        {"routing_strategy": "mixlora", "router_init_range": 0.5},
        {"use_dora": True, "target_modules": "all-linear"},
        {"target_modules": r".*\.layers\.[01]\..*_proj"},
        {"routing_strategy": "mixlora", "lora_dropout": 0.0},
        {"routing_strategy": "mixlora-dynamic", "top_p": 0.5, "temperature": 0.25},
        {"routing_strategy": "mixlora-switch", "expert_capacity": 7, "ffn_dropout": 0.5},
        {"routing_strategy": "mixlora-switch", "capacity_factor": 1.25, "capacity_seq_len": 256},
        {"routing_strategy": "mixlora", "expert_lora": {"r": 4, "use_dora": True}},
        {"routing_strategy": "loramoe", "num_experts": 6},
        {"routing_strategy": "mola", "router_loss": True, "router_init_range": 1.0},
        {"routing_strategy": "milora", "router_weight": "probability", "route_prompt": True},
        {"routing_strategy": "milora", "router_weight": "straight_through", "top_k": 7},
        {"routing_strategy": "milora", "route_prompt": False, "pooler": "max", "use_dora": True},
        {"routing_strategy": "milora", "router_act": "gelu", "router_aux_loss_coef": 0.1},
    ],
)
def test_config_round_trip(values: dict) -> None:
    config = AdapterConfig.from_dict(values)
    written = config.to_dict()
    assert AdapterConfig.from_dict(json.loads(json.dumps(written))) == config
    if values.get("lora_dropout") == 0:
        assert 0 < written["lora_dropout"] < 1e-8  # pip `mixlora` refuses 0
        written["lora_dropout"] = 0.0
    expert_lora = written.pop("expert_lora", {})
    assert values.pop("expert_lora", {}).items() <= expert_lora.items()
    assert values.items() <= written.items()
    assert written["peft_type"] == (config.router.kind if config.router else "LORA")
    assert config.peft_type != "MIXLORA" or written["act_fn"] == config.act_fn


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
def test_config_saved_by_peft(tmp_path, task_type: str | None) -> None:
    from peft import LoraConfig

    LoraConfig(
        r=3, lora_alpha=6, target_modules=["q_proj"], task_type=task_type, use_rslora=True
    ).save_pretrained(tmp_path)
    config = AdapterConfig.from_dict(json.loads((tmp_path / CONFIG_FILE).read_text()))
    assert (config.r, config.lora_alpha, config.target_modules) == (3, 6, ["q_proj"])
    assert config.use_rslora and config.routing_strategy is None


@pytest.mark.parametrize(
    "values, message",
    [
        ({"num_expert": 4}, "unknown key 'num_expert' (did you mean 'num_experts'?)"),
        ({"lora_aplha": 4}, "unknown key 'lora_aplha' (did you mean 'lora_alpha'?)"),
        ({"zzz": 4}, "unknown key 'zzz' (known: act_fn, "),
        ({"use_qalora": True}, "use_qalora = True is not supported"),
        ({"lora_bias": True}, "lora_bias = True is not supported"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out = True is not supported"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern = {'q_proj': 4} is not supported"),
        ({"layers_to_transform": [0]}, "layers_to_transform = [0] is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save = ['lm_head'] is not supported"),
        ({"expert_lora": {"r": 4}}, "expert_lora must be absent without experts, got "),
        (MIXLORA | {"expert_lora": {"r": 0}}, "expert_lora.r must be > 0, got 0"),
        (MIXLORA | {"expert_lora": {"rank": 4}}, "unknown key 'expert_lora.rank' (known: bias, "),
        ({"expert_capacity": 32}, "expert_capacity = 32: plain LoRA has no such setting"),
        (MIXLORA | {"top_p": 0.5}, "top_p = 0.5: routing_strategy mixlora has no such setting"),
        ({"act_fn": "relu"}, "act_fn must be one of silu, gelu, gelu_pytorch_tanh, relu, and only"),
        ({"routing_strategy": "mola", "use_dora": True}, "use_dora must be false for the experts"),
        ({"routing_strategy": "loramoe", "router_loss": True}, "router_loss must be false for"),
        ({"routing_strategy": "mixlora-dynamic", "top_p": 0}, "top_p must be in (0, 1], got 0"),
        (
            {"routing_strategy": "mixlora-switch", "top_k": 1},
            "top_k = 1: routing_strategy mixlora-",
        ),
        (MIXLORA | {"capacity_factor": 1.25}, "capacity_factor = 1.25: routing_strategy mixlora"),
        ({"task_type": "SEQ_CLS"}, "task_type must be CAUSAL_LM or QUESTION_ANS, got 'SEQ_CLS'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),  # it changes the base model
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"bias": "all"}, "bias must be none, got 'all'"),
        ({"routing_strategy": "mixlora-swich"}, "(did you mean 'mixlora-switch'?)"),
        ({"peft_type": "LOHA"}, "peft_type must be LORA with routing_strategy None, got 'LOHA'"),
        ({"peft_type": "MIXLORA"}, "peft_type must be LORA with routing_strategy None"),
        ({"r": 0}, "r must be > 0, got 0"),
        ({"r": 2.5}, "r must be a whole number, got 2.5"),
        ({"r": True}, "r must be a whole number, got True"),
        ({"lora_alpha": -1}, "lora_alpha must be > 0, got -1"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a finite number"),
        ({"lora_dropout": 1.0}, "lora_dropout must be in [0, 1), got 1.0"),
        ({"target_modules": [["q_proj"]]}, "target_modules.0 must be text, got a list"),
        ({"router_loss": True}, "router_loss = True: plain LoRA has no such setting"),
        ({"router_z_loss_coef": 0.1}, "router_z_loss_coef = 0.1: plain LoRA has no such setting"),
        (MIXLORA | {"capacity_seq_len": 9}, "capacity_seq_len = 9: routing_strategy mixlora has"),
        (SWITCH | {"capacity_seq_len": 9}, "capacity_seq_len must be > 0, and beside capacity_f"),
        (
            SWITCH | {"capacity_seq_len": 64, "capacity_factor": 1.5, "expert_capacity": 3},
            "expert_capacity = 3: capacity_factor makes it 24",
        ),
        ({"dropout_masks": "independent"}, "dropout_masks must be shared, but with experts of a"),
        ({"target_modules": []}, "target_modules must be a list of at least one projection"),
        ({"target_modules": "q_proj["}, "target_modules must be a list of at least one projection"),
        ({"target_modules": None}, "target_modules must be a list of text or text, got nothing"),
        (MIXLORA | {"top_k": 9}, "top_k must be in [1, 4], got 9"),
        (MIXLORA | {"num_experts": 0}, "num_experts must be > 0, got 0"),
        (MIXLORA | {"act_fn": "tanh"}, "act_fn must be one of silu, gelu, gelu_pytorch_tanh, relu"),
    ],
)
def test_wrong_config(values: dict, message: str) -> None:
    said = error_of(AdapterConfig.from_dict, values, "here.json")
    assert said.startswith("here.json: ")
    assert message in said


@torch.no_grad()
def test_several_adapters() -> None:
    model = tiny_model()
    base = logits_of(model)
    seen = {None: base}
    for seed, (name, kind) in enumerate({"a": {}, "b": MIXLORA, "c": {"r": 2}}.items()):
        add_filled(model, name, seed=seed, **kind)
        assert model.active_adapter == name
        seen[name] = logits_of(model)
    assert all(not torch.equal(seen[x], seen[y]) for x in seen for y in seen if x != y)
    for name in seen:
        model.active_adapter = name
        assert torch.equal(logits_of(model), seen[name])
        assert torch.equal(model(TOKENS_BS, adapters=[name] * 2), seen[name])

    model.active_adapter = "b"
    with mixlora.disable_adapters(model):
        assert torch.equal(logits_of(model), base)
    with pytest.raises(ZeroDivisionError), mixlora.disable_adapters(model):
        raise ZeroDivisionError
    assert model.active_adapter == "b"

    mixlora.remove_adapter(model, "c")
    assert model.active_adapter == "b"
    assert torch.equal(logits_of(model), seen["b"])
    mixlora.remove_adapter(model, "b")
    assert model.active_adapter is None
    assert torch.equal(logits_of(model), base)
    assert list(model.adapter_configs) == ["a"]
    mixlora.remove_adapter(model, "a")
    assert model.state_dict().keys() == tiny_model().state_dict().keys()
    assert error_of(model, TOKENS_BS.new_zeros(2)).startswith("tokens must be integers [B, S]")


@torch.no_grad()
def test_router_loss_after_its_adapter_is_gone() -> None:
    model = filled(MIXLORA)
    logits_of(model)
    mixlora.remove_adapter(model)
    assert model.router_loss() == 0


@pytest.mark.parametrize(
    "name", ["", "a.b", "a b", "a/b", "..", "\u00e4", "a\n", "keys", "items", "training", "pop"]
)
def test_names_that_are_not_allowed(name: str) -> None:
    model = tiny_model()
    said = error_of(mixlora.add_adapter, model, AdapterConfig(**MIXLORA), name)
    assert said == f"an adapter's name is letters, digits, _ and -, got {name!r}"
    assert not model.adapter_configs and model.active_adapter is None


@pytest.mark.parametrize("name", ["a", "task-7_B", "default", "0", "lora_A", "weight"])
def test_names_that_are_allowed(name: str) -> None:
    for kind in ({}, MIXLORA):
        model = filled(kind, name)
        parameters = [key for key, p in model.named_parameters() if p.requires_grad]
        assert list(adapter_parameters(model, name)) == parameters
        logits_of(model)


def test_wrong_calls() -> None:
    model = filled({}, "task")
    assert "already has an adapter named 'task'" in error_of(
        mixlora.add_adapter, model, AdapterConfig(), "task"
    )
    for function in (mixlora.remove_adapter, adapter_parameters):
        assert error_of(function, model, "tusk") == (
            "the model has no adapter named 'tusk' (did you mean 'task'?)"
        )
    said = error_of(mixlora.save_adapter, model, "nowhere", "tusk")
    assert "did you mean 'task'?" in said and not Path("nowhere").exists()
    config = AdapterConfig(target_modules=["q_proj", "gate_prj"])
    assert error_of(mixlora.add_adapter, model, config, "b") == (
        "target_modules: the model has no projection 'gate_prj' (did you mean 'gate_proj'?)"
    )
    assert list(model.adapter_configs) == ["task"]


def test_adapter_parameters_are_fp32_in_a_model_of_any_dtype() -> None:
    model = tiny_model().to(torch.bfloat16)
    for name, kind in (("a", {}), ("b", MIXLORA)):
        add_filled(model, name, **kind)
        assert {p.dtype for p in adapter_parameters(model, name).values()} == {torch.float32}
        assert logits_of(model).dtype == torch.bfloat16


@pytest.mark.parametrize("lora_init, std", [("original", (1 / 3 / 32) ** 0.5), ("gaussian", 1 / 8)])
@pytest.mark.parametrize("kind", [{}, MIXLORA], ids=["LoRA", "MixLoRA"])
def test_initial_values(kind: dict, lora_init: str, std: float) -> None:
    model = tiny_model(num_hidden_layers=4)
    torch.manual_seed(0)
    targets = [*ATTENTION, "gate_proj", "up_proj"]  # whose inputs are 32 wide
    config = AdapterConfig(r=8, lora_init=lora_init, target_modules=targets, **kind)
    mixlora.add_adapter(model, config)
    parameters = adapter_parameters(model)
    assert all(not p.any() for name, p in parameters.items() if name.endswith("lora_B"))
    a = torch.cat([p.flatten() for name, p in parameters.items() if name.endswith("lora_A")])
    assert_close(a.std(), torch.tensor(std), rel=0.03)
    if lora_init == "original":
        assert a.abs().max() <= 32**-0.5


def test_print_trainable_parameters(capsys) -> None:
    model = filled({"target_modules": ["q_proj"]}, "plain")
    add_filled(model, "mixture", target_modules=["o_proj", "up_proj"], **MIXLORA)
    mixlora.print_trainable_parameters(model)
    base = sum(p.numel() for p in tiny_model().parameters())
    plain = 2 * 4 * (32 + 32)  # layers * r * (in + out)
    routers, experts, lora = 2 * 4 * 32, 2 * 4 * 4 * (32 + 48), 2 * 4 * (32 + 32)
    first, second = (re.findall(r"\d[\d,]*", line) for line in capsys.readouterr().out.splitlines())
    numbers = [int(x.replace(",", "")) for x in first]
    assert numbers[:2] == [plain, base + plain] and numbers[-1] == plain
    numbers = [int(x.replace(",", "")) for x in second]
    total = routers + experts + lora
    assert numbers[:2] == [total, base + total] and numbers[-3:] == [routers, experts, lora]


@kinds
def test_save_and_load(kind: dict, tmp_path) -> None:
    model = filled({**kind, "lora_dropout": 0.1})
    mixlora.save_adapter(model, tmp_path / "deep" / "folder")
    other = tiny_model()
    mixlora.load_adapter(other, tmp_path / "deep" / "folder", "again")
    assert other.active_adapter == "again"
    assert torch.equal(logits_of(other), logits_of(model))
    assert not torch.equal(logits_of(other), logits_of(tiny_model()))
    (saved,), (loaded,) = model.adapter_configs.values(), other.adapter_configs.values()
    assert {**saved.to_dict(), "act_fn": None} == {**loaded.to_dict(), "act_fn": None}
    files = {p.name for p in (tmp_path / "deep" / "folder").iterdir()} - {PICKLED_FILE}
    assert files == {CONFIG_FILE, TENSOR_FILE}
    assert all(p.requires_grad for p in adapter_parameters(other, "again").values())


def test_no_earlier_file_stays_beside_a_saved_adapter(tmp_path) -> None:
    mixlora.save_adapter(filled(MIXLORA), tmp_path)
    assert (tmp_path / PICKLED_FILE).is_file()
    mixlora.save_adapter(filled({**MIXLORA, "use_dora": True}), tmp_path)
    assert not (tmp_path / PICKLED_FILE).exists()


def test_only_the_named_adapter_is_saved(tmp_path) -> None:
    model = filled({}, "a")
    add_filled(model, "b", seed=9, **MIXLORA)
    mixlora.save_adapter(model, tmp_path, "a")
    other = tiny_model()
    mixlora.load_adapter(other, tmp_path, "b")
    model.active_adapter = "a"
    assert torch.equal(logits_of(other), logits_of(model))


def pair_shapes(key: str, r: int, in_features: int, out_features: int) -> dict[str, list[int]]:
    return {f"{key}.lora_A.weight": [r, in_features], f"{key}.lora_B.weight": [out_features, r]}


def test_names_and_shapes_of_a_saved_mixlora(tmp_path) -> None:
    """As MoE-PEFT writes them."""
    mixlora.save_adapter(filled(MIXLORA), tmp_path)
    D, F, KV, r = 32, 48, 2 * 8, 4
    expected: dict[str, list[int]] = {}
    for layer in range(2):
        mlp, attention = f"mixlora.layers.{layer}.mlp", f"mixlora.layers.{layer}.self_attn"
        expected[f"{mlp}.moe_gate.weight"] = [4, D]
        for name, out in (("q_proj", D), ("k_proj", KV), ("v_proj", KV), ("o_proj", D)):
            expected |= pair_shapes(f"{attention}.{name}", r, D, out)
        for e in range(4):
            expected |= pair_shapes(f"{mlp}.gate_proj.experts.{e}", r, D, F)
            expected |= pair_shapes(f"{mlp}.up_proj.experts.{e}", r, D, F)
            expected |= pair_shapes(f"{mlp}.down_proj.experts.{e}", r, F, D)
    tensors = load_file(tmp_path / TENSOR_FILE)
    assert {name: list(x.shape) for name, x in tensors.items()} == expected
    assert {x.dtype for x in tensors.values()} == {torch.float32}
    values = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert values["act_fn"] == "silu" and values["peft_type"] == "MIXLORA"
    assert values["task_type"] == "CAUSAL_LM" and values["routing_strategy"] == "mixlora"


def test_experts_are_saved_in_their_order(tmp_path) -> None:
    model = filled(MIXLORA)
    mixlora.save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / TENSOR_FILE)
    for layer in range(2):
        mixture = model.model.layers[layer].mlp.mixtures["default"]
        for e in range(4):
            for projection in MLP:
                key = f"mixlora.layers.{layer}.mlp.{projection}.experts.{e}"
                experts = getattr(mixture, projection)
                assert torch.equal(tensors[f"{key}.lora_A.weight"], experts.lora_A[e])
                assert torch.equal(tensors[f"{key}.lora_B.weight"], experts.lora_B[e])


def state_of(model: nn.Module) -> tuple:
    return list(model.adapter_configs), model.active_adapter, list(model.state_dict())


def test_wrong_tensors_are_one_error(tmp_path) -> None:
    mixlora.save_adapter(filled(MIXLORA), tmp_path)
    path = tmp_path / TENSOR_FILE
    tensors = load_file(path)
    gate, expert = "mixlora.layers.1.mlp.moe_gate.weight", "mixlora.layers.0.mlp.up_proj.experts.2"
    del tensors[gate], tensors[f"{expert}.lora_B.weight"]
    tensors["surplus"] = torch.ones(2)
    tensors[f"{expert}.lora_A.weight"] = torch.ones(3, 32)
    save_file(tensors, path)
    said = error_of(mixlora.load_adapter, tiny_model(), tmp_path)
    assert said.startswith(f"{path}: 2 missing, 1 unexpected, 1 misshaped tensors")
    for part in (gate, f"{expert}.lora_B.weight", "unexpected: surplus"):
        assert part in said
    assert f"{expert}.lora_A.weight must be [4, 32], got [3, 32]" in said


def break_tensor(path: Path) -> None:
    tensors = load_file(path / TENSOR_FILE)
    name = sorted(tensors)[0]
    save_file({**tensors, name: tensors[name].T.contiguous()}, path / TENSOR_FILE)


def edit_config(path: Path, **values: object) -> None:
    old = json.loads((path / CONFIG_FILE).read_text())
    (path / CONFIG_FILE).write_text(json.dumps({**old, **values}))


FAULTS = {
    "no folder": lambda path: path.rename(path.with_name("gone")),
    "no config": lambda path: (path / CONFIG_FILE).unlink(),
    "no tensors": lambda path: [(path / x).unlink() for x in (TENSOR_FILE, PICKLED_FILE)],
    "not a pickle": lambda path: (path / TENSOR_FILE).rename(path / PICKLED_FILE),
    "config cut": lambda path: (path / CONFIG_FILE).write_text('{"r": '),
    "tensors cut": lambda path: (path / TENSOR_FILE).write_bytes(
        (path / TENSOR_FILE).read_bytes()[:-9]
    ),
    "transposed": break_tensor,
    "another rank": lambda path: edit_config(path, r=3),
    "more experts": lambda path: edit_config(path, num_experts=5),
    "another projection": lambda path: edit_config(path, target_modules=["o_proj"]),
    "unknown projection": lambda path: edit_config(path, target_modules=["c_attn"]),
    "plain LoRA": lambda path: edit_config(path, routing_strategy=None, peft_type="LORA"),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_failed_load_leaves_the_model_as_it_was(fault, tmp_path) -> None:
    folder = tmp_path / "adapter"
    mixlora.save_adapter(filled(MIXLORA), folder)
    fault(folder)
    model = filled({}, "first")
    add_filled(model, "second", **MIXLORA)
    model.active_adapter = "first"
    state, logits = state_of(model), logits_of(model)
    said = error_of(mixlora.load_adapter, model, folder, "new")
    assert str(folder) in said or "'c_attn'" in said
    assert state_of(model) == state
    assert torch.equal(logits_of(model), logits)


def test_load_under_a_name_that_is_taken(tmp_path) -> None:
    mixlora.save_adapter(filled(MIXLORA), tmp_path)
    model = filled({}, "mine")
    state, logits = state_of(model), logits_of(model)
    said = error_of(mixlora.load_adapter, model, tmp_path, "mine")
    assert said == "the model already has an adapter named 'mine'"
    assert state_of(model) == state
    assert torch.equal(logits_of(model), logits)


def test_loraplus_groups() -> None:
    for kind in ({}, MIXLORA):
        model = filled({**kind, "loraplus_lr_ratio": 16.0})
        parameters = adapter_parameters(model)
        optimizer = make_optimizer(parameters, OptimConfig(lr=0.5), 16.0)
        set_lr(optimizer, 0.25)
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        assert rates == {
            id(p): 4.0 if name.endswith("lora_B") else 0.25 for name, p in parameters.items()
        }
        assert {4.0, 0.25} == set(rates.values())


@kinds
def test_everything_trains_and_nothing_frozen_changes(kind: dict) -> None:
    model = tiny_model(mlp_bias=True).train()
    add_filled(model, "other", **MIXLORA)
    torch.manual_seed(0)
    mixlora.add_adapter(model, AdapterConfig(**{"r": 4, "lora_dropout": 0.1, **kind}))
    parameters = adapter_parameters(model)
    trainable = {key for key, p in model.named_parameters() if p.requires_grad}
    assert trainable == parameters.keys() | adapter_parameters(model, "other").keys()
    before = {key: x.clone() for key, x in model.state_dict().items()}
    optimizer = make_optimizer(parameters, OptimConfig(lr=1e-2, weight_decay=0.0), 1.0)
    tokens_BS = some_tokens(8, 40)
    labels_BS = tokens_BS.where(torch.arange(40) >= 5, -100)
    for _ in range(3):
        loss, num_labels = model(tokens_BS, labels_BS=labels_BS)
        optimizer.zero_grad()
        (loss / num_labels + model.router_loss()).backward()
        optimizer.step()
    if kind.get("routing_strategy") not in (None, "milora"):  # which counts prompts, of which 8 are
        for routing in model.routing("default"):
            assert routing.count_E.min() > 0
    after = model.state_dict()
    for key, x in before.items():
        assert torch.equal(x, after[key]) == (key not in parameters), key
    for key, parameter in parameters.items():
        moved = (parameter - before[key]).abs()
        moved = moved.flatten(1).sum(1) if moved.dim() > 1 else moved
        assert moved.all(), key  # every expert, every row


def test_lower_loss_after_training() -> None:
    """Ten steps on one batch, with the whole mixture in the way."""
    model = tiny_model().train()
    torch.manual_seed(0)
    mixlora.add_adapter(model, AdapterConfig(r=8, **MIXLORA))
    optimizer = make_optimizer(adapter_parameters(model), OptimConfig(lr=1e-2), 1.0)
    tokens_BS = torch.arange(20).expand(4, 20) % SIZES["vocab_size"]
    losses = []
    for _ in range(20):
        loss, num_labels = model(tokens_BS, labels_BS=tokens_BS)
        losses.append(loss.item() / num_labels.item())
        optimizer.zero_grad()
        (loss / num_labels + model.router_loss()).backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 4


def test_what_a_milora_file_holds(tmp_path) -> None:
    """Every option of its own, whatever the defaults; names and shapes of every tensor."""
    targets = ["v_proj", "up_proj"]
    model = filled({"routing_strategy": "milora", "top_k": 1, "target_modules": targets})
    mixlora.save_adapter(model, tmp_path)
    values = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert values["peft_type"] == "MILORA"
    own = {"top_k", "router_weight", "route_prompt", "pooler", "router_act", "lora_alpha"}
    assert own <= values.keys() and "num_experts" not in values
    expected: dict[str, list[int]] = {}
    for layer in range(2):
        at = f"milora.layers.{layer}"
        expected |= pair_shapes(f"{at}.self_attn.v_proj", 4, 32, 16)
        expected |= pair_shapes(f"{at}.mlp.up_proj", 4, 32, 48)
        expected[f"{at}.prompt_router.weight"] = [2, 32]
        expected[f"{at}.prompt_router.query"] = [32]
        expected[f"{at}.prompt_router.numerator"] = [7]
        expected[f"{at}.prompt_router.denominator"] = [5]
    tensors = load_file(tmp_path / TENSOR_FILE)
    assert {name: list(x.shape) for name, x in tensors.items()} == expected


def test_parts_of_milora(capsys) -> None:
    model = filled({"routing_strategy": "milora", "top_k": 1})
    mixlora.print_trainable_parameters(model)
    (line,) = capsys.readouterr().out.splitlines()
    routers = 2 * (7 * 32 + 32 + 12)
    assert f"routers {routers:,}, experts " in line
    freeze_but(model, "default", ["routers"])
    model(TOKENS_BS, labels_BS=TOKENS_BS)[0].backward()
    trained = {key for key, p in adapter_parameters(model).items() if p.grad is not None}
    assert trained and all(".prompt_router." in key for key in trained)
