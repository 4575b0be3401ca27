"""Several adapters trained at once on one base: each ends as if it had been alone."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml

import train
from mixlora.adapters import adapter_parameters
from mixlora.batches import alike, joined
from mixlora.data import Sample, collate
from mixlora.errors import InputError
from mixlora.layers.context import Span
from mixlora.metrics import Progress
from tests.runs import assert_same_weights, metrics, weights
from tests.tiny import FAMILIES, add_filled, some_tokens, tiny_model

METHODS = {
    "mix": {"routing_strategy": "mixlora", "r": 4, "num_experts": 4, "lora_dropout": 0.1},
    "plain": {"r": 8, "lora_dropout": 0.1},
    "mola": {"routing_strategy": "mola", "r": 2, "num_experts": 3, "router_loss": True},
    "dora": {"use_dora": True, "r": 2, "target_modules": ["q_proj", "down_proj"]},
    "switch": {
        "routing_strategy": "mixlora-switch",
        "r": 2,
        "num_experts": 3,
        "expert_capacity": 5,
        "ffn_dropout": 0.1,
        "lora_dropout": 0.1,
    },
    "mixdora": {"routing_strategy": "mixlora", "use_dora": True, "r": 3, "num_experts": 3},
}
RUNS = [
    {"name": "mix", "adapter": METHODS["mix"]},
    {
        "name": "plain",
        "adapter": METHODS["plain"],
        "optim": {"lr": 0.02, "schedule": "constant"},
        "train": {"steps": 3, "batch_size": 5, "micro_batch_size": 5},
    },
    {
        "name": "mola",
        "adapter": METHODS["mola"],
        "data": {"tasks": ["boolq"], "loss_on": "padded_text"},
    },
    {
        "name": "dora",
        "adapter": METHODS["dora"],
        "data": {"tasks": ["arc-e"]},
        "train": {"steps": None, "epochs": 2, "batch_size": 4, "gradient_checkpointing": True},
        "optim": {"schedule": "cosine"},
    },
    {"name": "switch", "adapter": METHODS["switch"], "train": {"batch_size": 3}},
    {"name": "mixdora", "adapter": METHODS["mixdora"], "train": {"activation": "recompute"}},
]
NUM_STEPS = {"mix": 6, "plain": 3, "mola": 6, "dora": 6, "switch": 6, "mixdora": 6}


@pytest.fixture
def settings(checkpoint: Path, task_folder: Path, tmp_path: Path) -> dict:
    return {
        "model": {"base": str(checkpoint)},
        "data": {"dir": str(task_folder), "tasks": ["arc-e", "boolq"]},
        "optim": {"lr": 0.01, "warmup_steps": 2},
        "train": {"steps": 6, "batch_size": 7, "micro_batch_size": 3, "max_seq_len": 96},
        "adapters": RUNS,
        "run": {"dir": str(tmp_path / "run"), "plot": False},
    }


def run(settings: dict, folder: Path, *arguments: str, code: int = 0, **of_run: object) -> Path:
    values = {**settings, "run": {**settings["run"], "dir": str(folder), **of_run}}
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(values))
    assert train.main(["--config", str(path), *arguments]) == code
    return folder


def assert_near(a: Path, b: Path, name: str, bound: float) -> None:
    """The weights of two runs, relative to each tensor's largest; and what they logged."""
    a_weights, b_weights = weights(a, name), weights(b, name)
    assert a_weights.keys() == b_weights.keys()
    for key, x in a_weights.items():
        assert (x - b_weights[key]).abs().max() <= bound * b_weights[key].abs().max(), (name, key)
    for one, other in zip(metrics(a, name), metrics(b, name), strict=True):
        assert one["step"] == other["step"] and one["lr"] == other["lr"]
        assert one["loss"] == pytest.approx(other["loss"], rel=bound)


def test_together_is_one_after_the_other(settings: dict, tmp_path: Path, float64: None) -> None:
    """Six methods of different ranks, targets, data, batches, micro-batches, steps and epochs."""
    both = run(settings, tmp_path / "together")
    alone = run(settings, tmp_path / "alone", together=1)
    for name, num_steps in NUM_STEPS.items():
        assert len(metrics(both, name)) == num_steps
        assert_near(both, alone, name, 1e-10)


@pytest.mark.slow
def test_together_is_one_after_the_other_but_for_rounding(settings: dict, tmp_path: Path) -> None:
    """In float32, by the bound that docs/config.md tells."""
    both = run(settings, tmp_path / "together")
    alone = run(settings, tmp_path / "alone", together=1)
    for name in NUM_STEPS:
        assert_near(both, alone, name, 1e-3)


@pytest.mark.slow
def test_one_after_the_other_is_alone_to_the_bit(settings: dict, tmp_path: Path) -> None:
    in_turn = run(settings, tmp_path / "in_turn", together=1)
    for entry in RUNS[:2]:
        alone = run({**settings, "adapters": [entry]}, tmp_path / entry["name"])
        assert metrics(in_turn, entry["name"]) == metrics(alone, entry["name"])
        assert_same_weights(weights(in_turn, entry["name"]), weights(alone, entry["name"]))


def test_a_place_that_is_free_is_taken(settings: dict, tmp_path: Path, monkeypatch) -> None:
    """Two at once: the third begins when the first has ended, which is then gone."""
    seen = []
    real = train.joined

    def spy(batches: dict) -> tuple:
        seen.append(sorted(batches))
        return real(batches)

    monkeypatch.setattr(train, "joined", spy)
    monkeypatch.setattr("mixlora.batches.MAX_PADDING", math.inf)
    entries = [
        {"name": name, "adapter": METHODS["plain"], "train": {"steps": steps, "batch_size": 3}}
        for name, steps in (("a", 1), ("b", 3), ("c", 1), ("d", 2))
    ]
    run({**settings, "adapters": entries}, tmp_path / "run", together=2)
    assert seen == [["a", "b"], ["b", "c"], ["b", "d"], ["d"]]


@pytest.mark.slow
def test_each_is_scored_and_shown_in_order(settings: dict, tmp_path: Path, capsys) -> None:
    settings |= {"eval": {"tasks": ["arc-e"]}, "adapters": RUNS[:3]}
    settings["adapters"][2] = {**RUNS[2], "eval": {"tasks": ["boolq"]}}
    both = run(settings, tmp_path / "together", plot=True)
    alone = run(settings, tmp_path / "alone", together=1)
    both, alone = (json.loads((x / "results.json").read_text())["results"] for x in (both, alone))
    assert list(both) == ["base", "mix", "plain", "mola"]  # plain is the first to end
    assert both == alone
    err = capsys.readouterr().err
    for name in ("mix", "plain", "mola"):
        assert f"train {name}  {NUM_STEPS[name]}/{NUM_STEPS[name]} steps" in err


def test_one_that_fails_stops_alone(settings: dict, tmp_path: Path, capsys, monkeypatch) -> None:
    """A learning rate beyond all numbers: its first step leaves weights that give NaN."""
    settings["adapters"] = [*RUNS[:2], {**RUNS[2], "optim": {"lr": 1e30}}]
    monkeypatch.setattr("mixlora.batches.MAX_PADDING", math.inf)
    both = run(settings, tmp_path / "together", code=2, save_every_steps=1, plot=True)
    err = capsys.readouterr().err
    (told,) = (line for line in err.splitlines() if "the gradient is not finite" in line)
    assert told.startswith("error: mola: step ")
    assert err.splitlines()[-1] == "error: stopped before their last step, as told above: mola"
    step = int(told.split("step ")[1].partition(":")[0])
    assert len(metrics(both, "mola")) == step - 1
    saved = {path.name for path in (both / "mola" / "checkpoints").iterdir()}
    assert f"step-{step - 1:06d}" in saved
    assert not (both / "mola" / "adapter").exists()
    alone = run({**settings, "adapters": RUNS[:2]}, tmp_path / "alone", together=1)
    for name in ("mix", "plain"):
        assert len(metrics(both, name)) == NUM_STEPS[name]
        assert_near(both, alone, name, 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [{}, {"mix": 2, "plain": 2, "switch": 4}])
def test_each_goes_on_from_its_own_step(
    settings: dict, tmp_path: Path, float64: None, stop: dict[str, int]
) -> None:
    """All from step 4 or their end; or from different steps, one of them from its beginning."""
    whole = run(settings, tmp_path / "whole", save_every_steps=1, keep_last=100)
    shutil.copytree(whole, tmp_path / "resumed")
    for name in NUM_STEPS:
        folder = tmp_path / "resumed" / name
        shutil.rmtree(folder / "adapter")
        for path in (folder / "checkpoints").iterdir():
            if int(path.name.removeprefix("step-")) > stop.get(name, 0 if stop else 4):
                shutil.rmtree(path)
    of_run = {"save_every_steps": 1, "keep_last": 100}
    resumed = run(settings, tmp_path / "resumed", "--resume", **of_run)
    for name in NUM_STEPS:
        assert_near(whole, resumed, name, 1e-10)


@pytest.mark.slow
def test_together_from_one_moment_goes_on_to_the_bit(settings: dict, tmp_path: Path) -> None:
    """Equal steps and micro-batches: a stopped run and its checkpoints are of the same step."""
    settings["adapters"] = [{"name": name, "adapter": METHODS[name]} for name in METHODS]
    whole = run(settings, tmp_path / "whole", save_every_steps=3)
    shutil.copytree(whole, tmp_path / "resumed")
    for name in METHODS:
        shutil.rmtree(tmp_path / "resumed" / name / "checkpoints" / "step-000006")
    resumed = run(settings, tmp_path / "resumed", "--resume", save_every_steps=3)
    for name in METHODS:
        assert metrics(resumed, name) == metrics(whole, name)
        assert_same_weights(weights(resumed, name), weights(whole, name))


def test_a_terminal_shows_a_line_of_each(capsys: pytest.CaptureFixture, monkeypatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    bars = [Progress(f"train {name}", 2, "steps") for name in "ab"]
    for bar in (*bars, *bars):
        bar.advance(loss="0.5")
    for bar in bars:
        bar.close()
    err = capsys.readouterr().err
    assert "train a: 100%" in err and "train b: 100%" in err
    assert "\n" in err.partition("train b")[0]  # its line is below


@pytest.mark.parametrize("value", ["0", "-1", "two"])
def test_wrong_number_at_once(value: str, settings: dict, tmp_path: Path, capsys) -> None:
    run(settings, tmp_path / "run", f"run.together={value}", code=2)
    assert "together must be" in capsys.readouterr().err


# In one forward.

LENGTHS = {"mix": (7, 12, 5), "plain": (3,), "switch": (9, 9), "mixdora": (14, 2), "mola": (4, 6)}


def samples(lengths: tuple[int, ...], seed: int) -> list[Sample]:
    tokens_BS = some_tokens(len(lengths), max(lengths), seed)
    rows = [tokens_S[:length].tolist() for tokens_S, length in zip(tokens_BS, lengths, strict=True)]
    return [Sample(row, [-100, *row[1:]]) for row in rows]


def several(kind: str) -> torch.nn.Module:
    model = tiny_model(kind)
    for i, name in enumerate(LENGTHS):
        add_filled(model, name, seed=i, **{**METHODS[name], "lora_dropout": 0.3})
    return model.double().train()


def gradients(model: torch.nn.Module, names: list[str], poisoned: str | None = None) -> dict:
    """Of each adapter, trained in a forward with the others of `names`."""
    model.zero_grad()
    for i, name in enumerate(LENGTHS):
        model.generators[name] = torch.Generator().manual_seed(i)
    ids = {name: i for i, name in enumerate(LENGTHS)}
    batch, spans = joined({name: collate(samples(LENGTHS[name], ids[name])) for name in names})
    loss_B, _ = model(
        *(batch.tokens_BS,), mask_BS=batch.mask_BS, labels_BS=batch.labels_BS, adapters=spans,
        by_row=True,
    )  # fmt: skip
    losses = [loss_B[s.start : s.end].sum() + model.router_loss(s.name) for s in spans]
    assert [bool(loss.isnan()) for loss in losses] == [name == poisoned for name in names]
    torch.stack(losses).sum().backward()
    return {
        name: {key: p.grad.clone() for key, p in adapter_parameters(model, name).items()}
        for name in names
    }


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_training_alone(kind: str, checkpointing: bool) -> None:
    """Dropout, jitter, capacities and router losses included."""
    model = several(kind)
    model.gradient_checkpointing = model.recompute_ffn = checkpointing
    found = gradients(model, list(LENGTHS))
    for name in LENGTHS:
        for key, wanted in gradients(model, [name])[name].items():
            assert wanted.abs().max() > 0, key
            assert (found[name][key] - wanted).abs().max() <= 1e-11 * wanted.abs().max(), key


@pytest.mark.parametrize("poisoned", ["plain", "mix", "mola"])
def test_nan_stays_with_its_adapter(poisoned: str) -> None:
    model = several("llama")
    wanted = gradients(model, list(LENGTHS))
    with torch.no_grad():
        for parameter in adapter_parameters(model, poisoned).values():
            parameter.fill_(torch.nan)
    found = gradients(model, list(LENGTHS), poisoned)
    for name in LENGTHS.keys() - {poisoned}:
        for key, gradient in found[name].items():
            assert torch.equal(gradient, wanted[name][key]), key
    assert any(gradient.isnan().any() for gradient in found[poisoned].values())


@torch.no_grad()
def test_a_span_is_computed_at_its_length() -> None:
    """Its router sees no more tokens than are its own, padding of its own rows among them."""
    model = several("llama")
    batch, spans = joined({name: collate(samples(LENGTHS[name], 0)) for name in ("switch", "mix")})
    assert spans == [Span("switch", 0, 2, 9), Span("mix", 2, 5, 12)]
    model(batch.tokens_BS, mask_BS=batch.mask_BS, adapters=spans)
    assert {len(routing.expert_TK) for routing in model.routing("switch")} == {2 * 9}
    assert {len(routing.expert_TK) for routing in model.routing("mix")} == {3 * 12}


@pytest.mark.parametrize(
    "spans, said",
    [
        ([("a", 0, 2), ("a", 3, 4)], "spans must cover rows 0 to 4 in order"),
        ([("a", 0, 2), ("a", 2, 5)], "spans must cover rows 0 to 4 in order"),
        ([("a", 0, 2), ("a", 2, 2), ("a", 2, 4)], "spans must cover rows 0 to 4 in order"),
        ([("a", 0, 4, 8)], "a span's length must be in [1, 7], got 8"),
        ([("b", 0, 4)], "no adapter named 'b'"),
    ],
)
def test_wrong_spans(spans: list[tuple], said: str) -> None:
    model = tiny_model()
    add_filled(model, "a")
    with pytest.raises(InputError) as error:
        model(some_tokens(4, 7), adapters=[Span(*span) for span in spans])
    assert said in str(error.value)


def test_batches_are_joined_where_it_costs_little() -> None:
    def batch(B: int, S: int):
        return collate([Sample([1] * S, [-100, *[1] * (S - 1)])] * B)

    batches = {"a": batch(2, 9), "b": batch(8, 100), "c": batch(2, 80), "d": batch(3, 10)}
    batches["e"] = batch(1, 79)
    groups = alike(batches)
    assert [list(group) for group in groups] == [["b", "c"], ["e"], ["d", "a"]]
    whole, spans = joined(groups[0])
    assert whole.tokens_BS.shape == (10, 100) and whole.num_labels == 8 * 99 + 2 * 79
    assert not whole.mask_BS[8:, 80:].any() and (whole.labels_BS[8:, 80:] == -100).all()
    assert whole.positions_BS is None


def test_padding_that_is_learned_stays_as_it_is_alone() -> None:
    """Positions count it; what others' rows add is hidden and without a label."""
    rows = samples((4, 6), 0)
    learned = collate(rows, pad_id=0)
    whole, _ = joined({"learns": learned, "long": collate(samples((9,), 1))})
    assert torch.equal(whole.labels_BS[:2, :6], learned.labels_BS)
    assert torch.equal(whole.mask_BS[:2, :6], learned.mask_BS)
    assert not whole.mask_BS[:2, 6:].any() and (whole.labels_BS[:2, 6:] == -100).all()
    assert torch.equal(whole.positions_BS, torch.arange(9).expand(3, 9))
