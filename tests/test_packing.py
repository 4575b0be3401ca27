"""Packed rows give every sample the loss, the routing and the place it has alone."""

import random
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixlora.batches import joined
from mixlora.data import Batch, PackedRow, Sample, collate
from mixlora.layers.context import Span, before_labels
from mixlora.packing import packed
from tests.runs import assert_same_weights, metrics, run, weights
from tests.test_concurrent import METHODS, assert_near
from tests.tiny import FAMILIES, MIXLORA, SIZES, add_filled, tiny_model

LENGTHS = [9, 30, 1, 17, 5, 22, 2, 12]
MAX_LEN = 40
KINDS = {
    "lora": {},
    "dora": {"use_dora": True},
    "mixlora": MIXLORA,
    "mixdora": {**MIXLORA, "use_dora": True},
    "dynamic": {**MIXLORA, "routing_strategy": "mixlora-dynamic"},
    "switch": {"routing_strategy": "mixlora-switch", "num_experts": 3, "expert_capacity": 4},
    "mola": {"routing_strategy": "mola", "num_experts": 3, "router_loss": True},
    "loramoe": {"routing_strategy": "loramoe", "num_experts": 3},
    "milora": {"routing_strategy": "milora"},
    "midora": {"routing_strategy": "milora", "use_dora": True, "pooler": "max"},
}
KINDS["dynamic"].pop("top_k", None)


def some_samples(lengths: list[int] = LENGTHS, seed: int = 0) -> list[Sample]:
    """The last third of each is its answer."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for length in lengths:
        tokens = torch.randint(SIZES["vocab_size"], (length,), generator=generator).tolist()
        num_prompt = max(1, 2 * length // 3)
        samples.append(Sample(tokens, [-100] * num_prompt + tokens[num_prompt:]))
    return samples


def documents(row: PackedRow) -> list[tuple[slice, Sample]]:
    """Where each sample of a packed row stands, and the sample."""
    found, start = [], 0
    for length in row.lengths:
        place = slice(start, start + length)
        found.append((place, Sample(row.tokens[place], row.labels[place])))
        start += length
    return found


def forward(model: nn.Module, samples: list[Sample] | list[PackedRow]) -> Tensor:
    """Logits."""
    batch = collate(samples)
    return model(
        batch.tokens_BS,
        mask_BS=batch.mask_BS,
        segments_BS=batch.segments_BS,
        prompt_BS=before_labels(batch.labels_BS, batch.segments_BS),
    )


def losses_of(sample: Sample, logits_SV: Tensor) -> Tensor:
    return F.cross_entropy(logits_SV[:-1], torch.tensor(sample.tokens[1:]).long(), reduction="none")


@pytest.mark.parametrize("seed", range(20))
def test_rows_hold_every_sample_once(seed: int) -> None:
    rng = random.Random(seed)
    lengths = [rng.randint(1, MAX_LEN) for _ in range(rng.randint(1, 40))]
    samples = some_samples(lengths, seed)
    rows = packed(samples, MAX_LEN)
    assert packed(samples, MAX_LEN) == rows
    found = [sample for row in rows for _, sample in documents(row)]
    assert sorted(found) == sorted(samples)
    num_tokens = [len(row.tokens) for row in rows]
    assert max(num_tokens) <= MAX_LEN and min(num_tokens) > 0
    assert all(sum(row.lengths) == len(row.tokens) for row in rows)
    fewest = -(-sum(lengths) // MAX_LEN)
    assert fewest <= len(rows) <= 1.5 * fewest + 1


def test_rows_are_even() -> None:
    rows = packed(some_samples([1, 3, 4, 5, 7]), 10)
    assert [row.lengths for row in rows] == [[7, 3], [5, 4, 1]]


def test_padding_is_no_segment_and_has_no_label() -> None:
    rows = packed(some_samples(), MAX_LEN)
    batch = collate(rows)
    assert torch.equal(batch.mask_BS, batch.segments_BS >= 0)
    assert (batch.labels_BS[~batch.mask_BS] == -100).all()
    assert batch.num_labels == sum(collate([sample]).num_labels for sample in some_samples())
    assert batch.mask_BS.sum() == sum(LENGTHS) and not batch.mask_BS.all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "family, kind",
    [*(("llama", kind) for kind in KINDS), *((family, "mixlora") for family in FAMILIES)],
)
@torch.no_grad()
def test_every_token_has_the_loss_it_has_alone(family: str, kind: str, dtype: torch.dtype) -> None:
    """And so have the sums that the router's losses are made of. In float32 with weights of the
    usual size: products of other shapes are rounded otherwise, by as much as their size says."""
    bound = 1e-6 if dtype == torch.float32 else 1e-12
    model = tiny_model(family)
    add_filled(model, **KINDS[kind])
    for parameter in model.parameters():
        parameter.mul_(0.1 if parameter.dim() > 1 and dtype == torch.float32 else 1)
    model.to(dtype)
    samples = some_samples()
    rows = packed(samples, MAX_LEN)
    logits_BSV = forward(model, rows)
    got, router_loss = model.routing("default"), model.router_loss("default")
    for row, logits_SV in zip(rows, logits_BSV, strict=True):
        for place, sample in documents(row):
            alone_S = losses_of(sample, forward(model, [sample])[0])
            assert (losses_of(sample, logits_SV[place]) - alone_S).abs().lt(bound).all()

    forward(model, samples)  # a row each
    for routing, padded in zip(got, model.routing("default"), strict=True):
        assert torch.equal(routing.count_E, padded.count_E)
        assert torch.equal(routing.num_tokens, padded.num_tokens)
        assert torch.allclose(routing.prob_E, padded.prob_E, rtol=bound)
        assert torch.allclose(routing.entropy, padded.entropy, rtol=bound)
        assert torch.allclose(routing.z, padded.z, rtol=bound)
    assert torch.allclose(router_loss, model.router_loss("default"), rtol=bound)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_document_does_not_change_its_neighbours(kind: str) -> None:
    """Not by a bit, whichever is edited. MiLoRA's products have as many rows as tokens use them:
    with another number of rows they are rounded otherwise."""
    bound = 1e-5 if kind in ("milora", "midora") else 0
    model = tiny_model()
    add_filled(model, **KINDS[kind])
    rows = packed(some_samples(), MAX_LEN)
    before_BSV = forward(model, rows)
    for b, row in enumerate(rows):
        for place, _ in documents(row):
            tokens = [*row.tokens]
            tokens[place] = [(token + 1) % SIZES["vocab_size"] for token in tokens[place]]
            after_BSV = forward(model, [*rows[:b], row._replace(tokens=tokens), *rows[b + 1 :]])
            changed_BS = ((after_BSV - before_BSV).abs() > bound).any(-1)
            assert changed_BS[b, place].all()
            changed_BS[b, place] = False
            assert not changed_BS[collate(rows).mask_BS].any()


def test_packed_and_padded_rows_in_one_batch() -> None:
    """A packed adapter's rows beside one's that are not, and beside one's that learns padding."""
    batches = {
        "packed": collate(packed(some_samples(), MAX_LEN)),
        "plain": collate(some_samples([34, 35], seed=1)),
        "learns": collate(some_samples([36, 33], seed=2), pad_id=5),
    }
    model = tiny_model()
    for seed, name in enumerate(batches):
        add_filled(model, name, seed=seed, **MIXLORA)
    batch, spans = joined(batches)
    assert [span.length for span in spans] == [len(b.tokens_BS[0]) for b in batches.values()]

    def losses(batch: Batch, adapters: list[Span]) -> Tensor:
        return model(
            batch.tokens_BS,
            mask_BS=batch.mask_BS,
            positions_BS=batch.positions_BS,
            segments_BS=batch.segments_BS,
            labels_BS=batch.labels_BS,
            adapters=adapters,
            by_row=True,
        )[0]

    together_B = losses(batch, spans)
    routing = {name: model.routing(name) for name in batches}
    for span in spans:
        alone = batches[span.name]
        alone_B = losses(alone, [Span(span.name, 0, len(alone.tokens_BS))])
        assert torch.allclose(together_B[span.start : span.end], alone_B, rtol=1e-6)
        for a, b in zip(routing[span.name], model.routing(span.name), strict=True):
            assert torch.equal(a.count_E, b.count_E)


STEADY = {"lora_dropout": 0.0, "ffn_dropout": 0.0, "jitter_noise": 0.0}  # drawn by place
RUNS = {**METHODS, "milora": {"routing_strategy": "milora", "r": 4, "top_k": 2}}
RUNS["switch"] = {**METHODS["switch"], "jitter_noise": 0.0}
QUICK = [("mix", "answer"), ("plain", "text"), ("milora", "answer")]
SLOW = [(name, "answer") for name in ("mola", "dora", "switch", "mixdora")]


@pytest.mark.parametrize(
    "name, loss_on", [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_a_packed_run_is_the_unpacked_one(
    name: str,
    loss_on: str,
    settings: dict,
    tmp_path: Path,
    float64: None,
) -> None:
    """In float64, without dropout, whose masks follow the tokens' places."""
    settings["adapter"] = {key: STEADY.get(key, value) for key, value in RUNS[name].items()}
    settings["data"]["loss_on"] = loss_on
    settings["train"] |= {"steps": 3, "micro_batch_size": 7}
    plain = shutil.move(run(settings, tmp_path), tmp_path / "plain")
    settings["data"]["packing"] = True
    folder = run(settings, tmp_path)
    first, wanted = metrics(folder)[0], metrics(plain)[0]
    assert first["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-9)
    for one, other in zip(metrics(folder), metrics(plain), strict=True):
        assert one["expert_load"] == other["expert_load"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-9)
        assert one["router_loss"] == pytest.approx(other["router_loss"], rel=1e-9)
    wanted = weights(plain)
    for key, x in weights(folder).items():
        assert (x - wanted[key]).abs().max() <= 1e-6 * wanted[key].abs().max(), key


@pytest.mark.slow
def test_packed_adapters_together_are_as_alone(
    settings: dict,
    tmp_path: Path,
    float64: None,
) -> None:
    """Beside two that are not packed, one of which learns its padding."""
    settings["adapters"] = [
        {"name": "mix", "adapter": RUNS["mix"], "data": {"packing": True}},
        {"name": "switch", "adapter": RUNS["switch"], "data": {"packing": True}},
        {"name": "plain", "adapter": RUNS["plain"]},
        {"name": "mola", "adapter": RUNS["mola"], "data": {"loss_on": "padded_text"}},
    ]
    del settings["adapter"]
    folders = []
    for together in (4, 1):
        settings["run"] |= {"dir": str(tmp_path / f"run {together}"), "together": together}
        folders.append(run(settings, tmp_path))
    for entry in settings["adapters"]:
        assert_near(*folders, entry["name"], 1e-10)


def test_a_packed_run_resumes_exactly(settings: dict, tmp_path: Path) -> None:
    """With dropout, and micro-batches of 2 rows."""
    settings["data"]["packing"] = True
    settings["train"]["micro_batch_size"] = 2
    settings["run"] |= {"save_every_steps": 1, "keep_last": 100}
    folder = run(settings, tmp_path)
    expected_metrics, expected_weights = metrics(folder), weights(folder)
    for step in range(4, 7):
        shutil.rmtree(folder / f"default/checkpoints/step-00000{step}")
    run(settings, tmp_path, "--resume")
    assert metrics(folder) == expected_metrics
    assert_same_weights(weights(folder), expected_weights)
