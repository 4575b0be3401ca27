"""The CUDA kernels, executed on the CPU, over the edges of T, of loads, of widths and of dtypes, in
every order of threads; what the runtime that executes them notices; and a build without CUDA."""

import ctypes
import re
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mixlora import _C, ops
from tests.cuda_on_cpu import (
    CXX,
    FLAGS,
    MISSING,
    ORDERS,
    ROOT,
    SANITIZER,
    build,
    counts,
    cuda_on_cpu,
)
from tests.kernels import poisoned
from tests.numerics import assert_close_to_ref64

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"CUDA kernels on the CPU: {MISSING}")
seen = pytest.mark.skipif(bool(SANITIZER), reason="a sanitizer sees the accesses")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def some_experts(T: int, K: int, E: int, load: str) -> Tensor:
    generator = torch.Generator().manual_seed(T)
    expert_TK = torch.rand(T, E, generator=generator).argsort(1)[:, :K].sort(1).values.int()
    if load == "one expert":
        expert_TK[:] = torch.arange(K) + E - K
    if load == "empty experts":
        expert_TK = expert_TK // 2 * 2
    if load == "empty slots":
        expert_TK[torch.rand(T, K, generator=generator) < 0.4] = -1
    return expert_TK


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradients(op, leaves: list[Tensor], *others: object) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in leaves]
    outputs = [x for x in op(*leaves, *others) if x.requires_grad]
    seeds = [values(*x.shape, seed=i).to(x.dtype) for i, x in enumerate(outputs)]
    return [*outputs, *torch.autograd.grad(outputs, leaves, seeds)]


def scatter(op, plan: ops.Plan):
    return lambda y_ND, *weight_TK: (op(y_ND, plan, *weight_TK),)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("load", ["uniform", "one expert", "empty experts", "empty slots"])
@pytest.mark.parametrize("T", [0, 1, 63, 64, 65, 257])
def test_edges(T: int, load: str, order: str) -> None:
    K, E = (2, 8) if T != 65 else (3, 20)
    expert_TK = some_experts(T, K, E, load)
    wanted = ops.moe_sort_ref(expert_TK, E)
    with cuda_on_cpu(order), poisoned():
        plan = ops.moe_sort(expert_TK, E)
    assert all(torch.equal(a, b) for a, b in zip(plan, wanted, strict=True))
    for dtype, D in zip(DTYPES * 2, (8, 40, 4, 7, 33, 1), strict=True):
        x_TD, y_ND = values(T, D).to(dtype), values(T * K, D, seed=1).to(dtype)
        weight_TK = values(T, K, seed=2).float()
        with cuda_on_cpu(order), poisoned():
            x_ND = ops.moe_gather(x_TD, plan)
            found = gradients(scatter(ops.moe_scatter, plan), [y_ND, weight_TK])
        assert torch.equal(x_ND, ops.moe_gather_ref(x_TD, plan))
        ref = gradients(scatter(ops.moe_scatter_ref, plan), [y_ND, weight_TK])
        wide = [y_ND.double(), weight_TK.double()]
        ref64 = gradients(scatter(ops.moe_scatter_ref, plan), wide)
        for a, b, b64 in zip(found, ref, ref64, strict=True):
            assert_close_to_ref64(a, b, b64)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("E, K", [(1, 1), (8, 2), (31, 5), (64, 8), (200, 3)])
@pytest.mark.parametrize("T", [0, 1, 63, 64, 65, 257])
def test_edges_of_the_router(T: int, E: int, K: int, order: str) -> None:
    mask_T = torch.arange(T) % 3 != 1 if T % 2 else None
    logits_TE = (3 * values(T, E)).to(DTYPES[T % 3])
    with cuda_on_cpu(order), poisoned():
        routing = ops.topk_router(logits_TE, K, mask_T)
        found = gradients(lambda x: ops.topk_router(x, K, mask_T)[:-1], [logits_TE])
    wanted = ops.topk_router_ref(logits_TE, K, mask_T)
    for name in ("expert_TK", "count_E", "num_tokens"):
        assert torch.equal(getattr(routing, name), getattr(wanted, name))
    ref, ref64 = (
        gradients(lambda x: ops.topk_router_ref(x, K, mask_T)[:-1], [x])
        for x in (logits_TE, logits_TE.double())
    )
    for a, b, b64 in zip(found, ref, ref64, strict=True):
        assert_close_to_ref64(a, b, b64)


@pytest.mark.parametrize("E, K", [(2, 12), (64, 6), (300, 2)])
def test_tuples_that_take_several_passes(E: int, K: int) -> None:
    expert_TK = values(1500, K).mul(E).long().remainder(E + 1).sub(1).int()
    with cuda_on_cpu("random"), poisoned():
        plan = ops.moe_sort(expert_TK, E)
    wanted = ops.moe_sort_ref(expert_TK, E)
    assert all(torch.equal(a, b) for a, b in zip(plan, wanted, strict=True))


def test_what_a_gpu_cannot_take_is_an_error() -> None:
    with cuda_on_cpu():
        with pytest.raises(RuntimeError, match="^moe_sort: num_experts must be at most 2047"):
            ops.moe_sort(torch.zeros(2, 2, dtype=torch.int32), 2048)
        with pytest.raises(RuntimeError, match="^topk_router: there must be at most 256 experts"):
            ops.topk_router(torch.zeros(2, 257), 2)


def moved(run, *, read: int, written: int) -> None:
    """Every tensor is read and written once: a block may read more than it needs of indices."""
    with cuda_on_cpu():
        counts()
        run()
    found = counts().values()
    assert sum(count.written_bytes for count in found) == written
    assert read <= sum(count.read_bytes for count in found) <= 1.01 * read


@seen
def test_bytes_that_kernels_move() -> None:
    T, K, E, D = 256, 2, 8, 1024
    plan = ops.moe_sort(some_experts(T, K, E, "uniform"), E)
    x_TD, y_ND = values(T, D).bfloat16(), values(T * K, D).bfloat16()
    weight_TK, rows, tokens, index = values(T, K).float(), 2 * T * K * D, 2 * T * D, 4 * T * K
    moved(lambda: ops.moe_scatter(y_ND, plan, weight_TK), read=rows + 2 * index, written=tokens)
    arguments = x_TD, y_ND, plan.row_slot_N, plan.slot_row_TK, weight_TK
    moved(
        lambda: torch.ops.mixlora.moe_scatter_backward(*arguments),
        read=tokens + rows + 3 * index,
        written=rows + index,
    )
    alone = plan._replace(row_slot_N=torch.arange(T * K, dtype=torch.int32))  # no row twice a block
    moved(lambda: ops.moe_gather(x_TD, alone), read=tokens + index, written=rows)


FAULTS = {
    "a barrier is missing": (
        "SHARED_ARRAY(float[64], x); x[threadIdx.x] = 1; p[threadIdx.x] = x[63 - threadIdx.x];",
        "not ordered after an access|unwritten",
    ),
    "a barrier is missing before the next round": (
        "SHARED_ARRAY(float[64], x); for (int i = 0; i < 2; ++i) { x[threadIdx.x] = i;"
        "__syncthreads(); p[threadIdx.x] = x[63 - threadIdx.x]; }",
        "is not ordered after an access by thread",
    ),
    "shuffles do not order memory": (
        "SHARED_ARRAY(float[64], x); x[threadIdx.x] = 1; __shfl_xor_sync(kAllLanes, 1, 1);"
        "p[threadIdx.x] = x[threadIdx.x ^ 1];",
        "a load is not ordered after",
    ),
    "two blocks write the same": ("p[threadIdx.x] = 1;", "of another block"),
    "shared memory is not initialised": (
        "SHARED_ARRAY(float[64], x); p[threadIdx.x] = x[threadIdx.x];",
        "a load of unwritten shared memory",
    ),
    "shared memory ends": (
        "SHARED_ARRAY(float[64], x); x[threadIdx.x + 1] = 1;",
        "beside a shared array",
    ),
    "an address is not aligned": (
        "store_pack(p + 101, load_pack<4>(p + 256));",
        "an address is no multiple of 16",
    ),
    "a barrier that not all reach": (
        "if (threadIdx.x < 32) __syncthreads();",
        "threads are at different barriers",
    ),
    "lanes that do not come": (
        "if (threadIdx.x != 5) __syncwarp(); else __syncthreads();",
        "for lanes that do not come",
    ),
    "two collectives at once": (
        "if (threadIdx.x % 2) __syncwarp();\n else __ballot_sync(kAllLanes, true);",
        "are in different collectives",
    ),
    "an index out of range": (
        "const int i = threadIdx.x; CHECK_INDEX(i, 0, 63);",
        r"i must be in \[0, 63\), got 63",
    ),
}


TEMPLATE = """
#include "common/cuda.cuh"
namespace mixlora {
namespace {
KERNELS
std::string error;
}
extern "C" __attribute__((visibility("default"))) const char* run(int i, float* p) {
  CudaQueue queue{};
  LAUNCHES
  return (error = queue.error).c_str();
}
}
"""


@seen
def test_faults_that_the_runtime_notices(tmp_path: Path) -> None:
    """One kernel for each, in one file; the last is right."""
    bodies = [body for body, _ in FAULTS.values()] + ["if (blockIdx.x == 0) p[threadIdx.x] = 1;"]
    kernels = "".join(
        f"__global__ void kernel_{i}(float* p) {{ {body} }}\n" for i, body in enumerate(bodies)
    )
    launches = "".join(
        f"if (i == {i}) launch<kernel_{i}>(dim3(2), dim3(64), 0, queue, p);\n"
        for i in range(len(bodies))
    )
    text = TEMPLATE.replace("KERNELS", kernels).replace("LAUNCHES", launches)
    source, library = tmp_path / "faults.cu", tmp_path / "faults.so"
    source.write_text(text)
    command = [CXX, *FLAGS.replace("-MMD", "").split(), "-O1", "-Wno-unused"]
    for file, *more in (source, "-fsanitize=thread", "-xc++"), (ROOT / "tests/cuda_on_cpu.cpp",):
        more += ["-c", str(file), "-o", str(tmp_path / f"{file.name}.o")]
        subprocess.run(command + more, cwd=ROOT, check=True)
    subprocess.run([CXX, "-shared", *tmp_path.glob("*.o"), "-o", library], check=True)

    run = ctypes.CDLL(str(library)).run
    run.restype, run.argtypes = ctypes.c_char_p, (ctypes.c_int, ctypes.c_void_p)
    memory = torch.zeros(1024)
    for i, (name, (_, message)) in enumerate(FAULTS.items()):
        said = run(i, memory.data_ptr()).decode()
        assert re.match(rf"kernel_{i}, block \(.*({message})", said), f"{name}: {said or 'nothing'}"
    assert run(len(FAULTS), memory.data_ptr()) == b""


def test_a_build_without_cuda_says_so() -> None:
    """Of a GPU's tensor that there is none is not asked before its kernel would run."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    if _C.build_info()["cuda_architectures"]:
        pytest.skip("this build has CUDA")
    with FakeTensorMode():
        x_TD = torch.empty(3, 8, device="cuda")
        slot_row_TK = torch.empty(3, 2, dtype=torch.int32, device="cuda")
        arguments = {
            "moe_sort": (slot_row_TK, 4),
            "moe_gather": (x_TD, slot_row_TK.view(-1), slot_row_TK),
            "moe_scatter": (x_TD, slot_row_TK.view(-1), slot_row_TK, None),
            "topk_router": (x_TD, 2, None, None),
        }
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    for op, values in arguments.items():
        with pytest.raises(RuntimeError) as error:
            getattr(torch.ops.mixlora, op).default.redispatch(keys, *values)
        assert str(error.value) == (
            f"{op}: this build of mixlora has no CUDA kernels, got a tensor on cuda:0: run "
            "`make kernels` where torch is a CUDA build and nvcc is found"
        )


def test_all_tensors_are_on_one_device() -> None:
    plan = ops.moe_sort(torch.zeros(3, 2, dtype=torch.int32), 1)
    meta = [x.to("meta") for x in (plan.row_slot_N, plan.slot_row_TK)]
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    with pytest.raises(RuntimeError, match="^moe_gather: all tensors must be on cpu, got one on "):
        torch.ops.mixlora.moe_gather.default.redispatch(keys, torch.zeros(3, 8), *meta)


def test_building_again_builds_nothing() -> None:
    before = build(ROOT / "build/cuda_on_cpu").stat().st_mtime_ns
    assert build(ROOT / "build/cuda_on_cpu").stat().st_mtime_ns == before
