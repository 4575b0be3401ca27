"""What runs on a GPU against what runs on the CPU: every op over the edges of its sizes, the
feed-forward in a CUDA graph, a training step. The ops' own tests run there too (tests/ops).

With the CPU in the GPU's place the tests themselves are tested, on one size of each.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from benchmarks.bench_ops import OPS, Sizes, dtypes_of, floats
from mixlora import ops
from mixlora.adapters import trained_parameters
from mixlora.layers.context import ForwardContext, Span
from mixlora.layers.mixlora_ffn import FeedForward
from mixlora.optim import OptimConfig, make_optimizer
from tests.cuda_on_cpu import ROOT, with_memory_on_gpu
from tests.layers.test_mixlora_ffn import make_ffn, trained
from tests.numerics import RELATIVE, assert_close
from tests.test_resume import EVERY_STEP, KINDS, assert_same_runs, forget
from tests.tiny import (
    MIXLORA,
    add_filled,
    normal,
    scattered,
    some_plan,
    some_tokens,
    tiny_model,
)

GPU = pytest.mark.gpu
# In the GPU's place the CPU tests these tests.
CPU = pytest.param("cpu", marks=pytest.mark.slow)
devices = pytest.mark.parametrize("device", [CPU, pytest.param("cuda", marks=GPU)])
every_op = pytest.mark.parametrize("op", OPS)

# T: (D, F, R, E, K, load), with whole and ragged tiles, and rows that are aligned or not
EDGES = {
    0: (32, 48, 4, 4, 2, "uniform"),
    1: (40, 24, 1, 4, 1, "uniform"),
    63: (33, 67, 8, 5, 2, "one pair"),
    64: (64, 128, 16, 8, 2, "some empty"),
    65: (72, 136, 24, 20, 3, "empty slots"),
    257: (264, 200, 64, 8, 4, "zipf"),
}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def sizes_of(T: int) -> tuple[Sizes, ops.Plan]:
    D, F, R, E, K, load = EDGES[T]
    return Sizes(T, D, F, R, E, K), some_plan(T, K, E, load)


def inputs(op: str, sizes: Sizes, dtype: torch.dtype) -> list[Tensor]:
    dtypes = dtypes_of(OPS[op], sizes, dtype)
    shapes = enumerate(OPS[op].shapes(*sizes))
    return [normal(*shape, seed=i).to(to) for (i, shape), to in zip(shapes, dtypes, strict=True)]


def results(op: str, plan: ops.Plan, tensors: list[Tensor], device: str) -> list[Tensor]:
    """Outputs and gradients of what is computed there, brought here."""
    plan = ops.Plan(*(x.to(device) for x in plan))
    leaves = [x.to(device).requires_grad_() for x in tensors]
    outputs = list(OPS[op].run(plan, *leaves))
    gradients = []
    if leaves:
        found = floats(outputs)
        dys = [normal(*x.shape, seed=9 + i).to(x) for i, x in enumerate(found)]
        gradients = torch.autograd.grad(found, leaves, dys)
    return [x.detach().cpu() for x in (*outputs, *gradients)]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@every_op
@pytest.mark.parametrize(
    "device, T", [("cpu", 65), *(pytest.param("cuda", T, marks=GPU) for T in EDGES)]
)
def test_edges(device: str, T: int, op: str, dtype: torch.dtype) -> None:
    """As in fp64, and as the CPU's kernel. How near a kernel must be, the ops' own tests say."""
    sizes, plan = sizes_of(T)
    tensors = inputs(op, sizes, dtype)
    found, native = results(op, plan, tensors, device), results(op, plan, tensors, "cpu")
    with ops.reference():
        ref64 = results(op, plan, [x.double() for x in tensors], "cpu")
    for a, b, b64 in zip(found, native, ref64, strict=True):
        rel = RELATIVE[dtype] if b.is_floating_point() else 0
        assert a.dtype == b.dtype
        assert_close(a, b, rel)
        assert_close(a, b64, rel)


@every_op
@devices
def test_gradcheck(device: str, op: str) -> None:
    plan = ops.Plan(*(x.to(device) for x in some_plan(5, 2, 4, "empty slots")))
    tensors = inputs(op, Sizes(T=5, D=6, F=7, R=3, E=4, K=2), torch.float64)
    leaves = [x.to(device).requires_grad_() for x in tensors]
    if leaves:
        assert torch.autograd.gradcheck(
            lambda *leaves: floats(OPS[op].run(plan, *leaves)), leaves, fast_mode=device == "cpu"
        )


@every_op
@devices
def test_same_bits_every_time(device: str, op: str) -> None:
    sizes, plan = sizes_of(257)
    tensors = inputs(op, sizes, torch.bfloat16)
    first = results(op, plan, tensors, device)
    for _ in range(99 if device == "cuda" else 1):
        again = results(op, plan, tensors, device)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


def step(ffn: FeedForward, x_BSD: Tensor, dy_BSD: Tensor) -> list[Tensor]:
    y_BSD = ffn(x_BSD, ForwardContext((Span("m", 0, len(x_BSD)),)))
    return [y_BSD, *torch.autograd.grad(y_BSD, [x_BSD, *trained(ffn).values()], dy_BSD)]


def test_memory_is_moved_as_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.UntypedStorage, "cuda", torch.UntypedStorage.clone)
    x = scattered(normal(3, 5))[1:]
    moved = with_memory_on_gpu(x)
    assert torch.equal(moved, x) and moved.data_ptr() != x.data_ptr()
    assert (moved.stride(), moved.storage_offset()) == (x.stride(), x.storage_offset())
    assert moved.untyped_storage().tolist() == x.untyped_storage().tolist()


@GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "strategy, config",
    [
        ("mixlora", {"num_experts": 8, "top_k": 2}),
        ("mixlora", {"num_experts": 3, "top_k": 2}),  # a library product of all experts
        ("mixlora", {"num_experts": 8, "top_k": 2, "use_dora": True}),
        ("mixlora-dynamic", {"num_experts": 8}),
        ("mixlora-switch", {"num_experts": 8}),
    ],
)
def test_feed_forward_in_a_cuda_graph(strategy: str, config: dict, dtype: torch.dtype) -> None:
    """Which holds nothing that waits for the GPU or depends on what it computed."""
    if strategy == "mixlora-switch":
        config = {"router": {"num_experts": 8, "jitter_noise": 0.0}}
    ffn = make_ffn(64, 96, strategy=strategy, **config).to("cuda")
    for name in ("gate_proj", "up_proj", "down_proj"):
        getattr(ffn, name).weight.data = getattr(ffn, name).weight.data.to(dtype)
    x_BSD, dy_BSD = (normal(3, 40, 64, seed=i).to("cuda", dtype) for i in range(2))
    x_BSD.requires_grad_()
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step(ffn, x_BSD, dy_BSD)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step(ffn, x_BSD, dy_BSD)
    for seed in (2, 4):  # new inputs, new routings
        with torch.no_grad():
            x_BSD.copy_(normal(3, 40, 64, seed=seed))
            dy_BSD.copy_(normal(3, 40, 64, seed=seed + 1))
        graph.replay()
        found = [x.clone() for x in outputs]
        for a, b in zip(found, step(ffn, x_BSD, dy_BSD), strict=True):
            assert_close(a, b, RELATIVE[dtype])


@GPU
def test_dropout_in_a_cuda_graph_is_drawn_anew() -> None:
    ffn = make_ffn(64, 96, num_experts=8, top_k=2, lora_dropout=0.5).to("cuda").train()
    x_BSD = normal(3, 40, 64, dtype=torch.float32).cuda().requires_grad_()
    step(ffn, x_BSD, x_BSD.detach())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y_BSD, *_ = step(ffn, x_BSD, x_BSD.detach())
    seen = []
    for _ in range(2):
        graph.replay()
        seen.append(y_BSD.clone())
    assert not torch.equal(*seen)


@pytest.mark.parametrize(
    "config", [MIXLORA, {}, {**MIXLORA, "use_dora": True}], ids=["MixLoRA", "LoRA", "MixDoRA"]
)
@devices
def test_training_steps(device: str, config: dict) -> None:
    tokens_BS = some_tokens(3, 24)

    def train(device: str) -> tuple[list[float], dict[str, Tensor]]:
        torch.manual_seed(0)
        model = tiny_model()
        add_filled(model, **config)
        model.to(device).train()
        parameters = trained_parameters(model)
        optimizer = make_optimizer(parameters, OptimConfig(lr=1e-3), 1.0)
        losses, gradients = [], {}
        for _ in range(3):
            total, num_labels = model(tokens_BS.to(device), labels_BS=tokens_BS.to(device))
            loss = total / num_labels + model.router_loss()
            loss.backward()
            losses.append(loss.item())
            gradients = gradients or {name: p.grad.cpu() for name, p in parameters.items()}
            torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return losses, gradients

    (losses, gradients), (wanted, wanted_gradients) = train(device), train("cpu")
    assert losses == pytest.approx(wanted, rel=1e-4)
    assert gradients.keys() == wanted_gradients.keys()
    for name, gradient in gradients.items():
        assert_close(gradient, wanted_gradients[name], rel=1e-4)


@devices
def test_a_resumed_run_is_the_uninterrupted_one(
    settings: dict, tmp_path: Path, device: str
) -> None:
    """As a program: cuBLAS is told to repeat itself before its first product."""
    kinds = {**KINDS, "mixlora": MIXLORA, "dynamic": {"routing_strategy": "mixlora-dynamic"}}
    settings["model"] |= {"device": device, "dtype": "bfloat16"}
    settings |= {"adapter": {}, "adapters": [{"name": x, "adapter": kinds[x]} for x in kinds]}
    settings["run"] |= {"deterministic": True, "together": 1, **EVERY_STEP}
    config, folder = tmp_path / "config.yaml", Path(settings["run"]["dir"])
    config.write_text(yaml.safe_dump(settings))
    program = [sys.executable, "train.py", "--config", str(config)]
    environment = {key: x for key, x in os.environ.items() if key != "CUBLAS_WORKSPACE_CONFIG"}
    subprocess.run(program, check=True, cwd=ROOT, env=environment)
    shutil.copytree(folder, tmp_path / "whole")
    for kind, stop in zip(kinds, (1, 2, 3, 4, 5, 1), strict=True):
        forget(folder, stop, kind)
    subprocess.run([*program, "--resume"], check=True, cwd=ROOT, env=environment)
    for kind in kinds:
        assert_same_runs(folder, tmp_path / "whole", kind)


@GPU
def test_blocks_do_not_wait_for_the_gpu() -> None:
    """Only the loss does, which takes the positions that have a label."""
    model = tiny_model()
    add_filled(model, **MIXLORA)
    model.to("cuda").train()
    tokens_BS = some_tokens(3, 24).cuda()
    model(tokens_BS).sum().backward()  # what is looked up once has been
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = model(tokens_BS).float().square().mean() + model.router_loss()
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
