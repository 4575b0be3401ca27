"""The CUDA kernels, executed on the CPU, over the edges of T, of loads, of widths and of dtypes, in
every order of threads; what the runtime that executes them notices; and a build without CUDA."""

import ctypes
import re
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.bench_ops import OPS as EVERY_OP
from mixlora import _C, ops
from tests.cuda_on_cpu import (
    CXX,
    FLAGS,
    MISSING,
    ORDERS,
    ROOT,
    SANITIZER,
    Count,
    build,
    counts,
    cuda_on_cpu,
)
from tests.kernels import assert_same_bits, poisoned
from tests.numerics import assert_close, assert_close_to_ref64
from tests.test_gpu import inputs, results, sizes_of

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"CUDA kernels on the CPU: {MISSING}")
*OTHERS, USUAL = ORDERS
SLOW = [pytest.param(order, marks=pytest.mark.slow) for order in OTHERS]
orders = pytest.mark.parametrize("order", [USUAL, *SLOW])
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


@orders
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


@orders
@pytest.mark.parametrize("E, K", [(1, 1), (8, 2), (31, 5), (64, 8), (200, 3)])
@pytest.mark.parametrize("T", [0, 1, 63, 64, 65, 257])
def test_edges_of_the_router(T: int, E: int, K: int, order: str) -> None:
    mask_T = torch.arange(T) % 3 != 1 if T % 2 else None
    logits_TE = (3 * values(T, E)).to(DTYPES[T % 3])
    with cuda_on_cpu(order), poisoned():
        routing = ops.topk_router(logits_TE, K, mask_T)
        found = gradients(lambda x: ops.topk_router(x, K, mask_T)[:7], [logits_TE])
    wanted = ops.topk_router_ref(logits_TE, K, mask_T)
    for name in ("expert_TK", "count_E", "num_tokens"):
        assert torch.equal(getattr(routing, name), getattr(wanted, name))
    ref, ref64 = (
        gradients(lambda x: ops.topk_router_ref(x, K, mask_T)[:7], [x])
        for x in (logits_TE, logits_TE.double())
    )
    for a, b, b64 in zip(found, ref, ref64, strict=True):
        assert_close_to_ref64(a, b, b64)


@pytest.mark.parametrize("T", [63, pytest.param(65, marks=pytest.mark.slow)])
@pytest.mark.parametrize("op", EVERY_OP)
def test_no_order_of_threads_changes_a_bit(op: str, T: int) -> None:
    sizes, plan = sizes_of(T)
    tensors, found = inputs(op, sizes, torch.bfloat16), []
    for order in ORDERS:
        with cuda_on_cpu(order), poisoned():
            found.append(results(op, plan, tensors, "cpu"))
    assert_same_bits(found[1], found[0])
    assert_same_bits(found[2], found[0])


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
        plan = ops.moe_sort(torch.zeros(2, 1, dtype=torch.int32), 65)
        inputs = torch.zeros(2, 8), torch.zeros(2, 8), *[None] * 5, plan, torch.zeros(2, 1), 1.0
        with pytest.raises(RuntimeError, match="^shared_glu: num_experts must be at most 64"):
            ops.shared_glu(*inputs)


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


@seen
def test_bytes_that_grouped_products_move() -> None:
    """x once for each slot, and a matrix once for each 64 rows, or 128 tokens, of its expert."""
    T, K, E, R, I = 256, 2, 8, 16, 1024
    plan = ops.moe_sort(some_experts(T, K, E, "uniform"), E)
    rows = plan.expert_TK, plan.expert_start_E1, plan.row_slot_N
    x_TI, w_ERI = values(T, I).bfloat16(), values(E, R, I, seed=1).bfloat16()
    a_TKR, panels = values(T, K, R, seed=2).bfloat16(), I // 64
    matrix, tiles = 2 * R * I, -(-plan.expert_start_E1.diff() // 64)

    def count(op: str, *arguments: object) -> dict[str, Count]:
        with cuda_on_cpu():
            counts()
            getattr(torch.ops.mixlora, op)(*arguments, False, *rows)
            return counts()

    shrink = count("grouped_shrink", x_TI, w_ERI)["shrink_kernel<Bf16, false>"]
    wanted = 2 * T * K * I + int(tiles.sum()) * matrix
    assert wanted <= shrink.read_bytes <= 1.02 * wanted
    expand = count("grouped_expand", a_TKR, w_ERI)["expand_kernel<Bf16, false, 1>"]
    wanted = T // 128 * E * matrix + panels * 2 * a_TKR.numel()
    assert wanted <= expand.read_bytes <= 1.2 * wanted
    assert expand.written_bytes == 2 * T * I
    outer = count("grouped_outer", a_TKR, x_TI)["outer_kernel<Bf16, 1>"]
    wanted = 2 * T * K * I + panels * 2 * a_TKR.numel()
    assert wanted <= outer.read_bytes <= 1.05 * wanted
    assert outer.written_bytes == E * matrix


# Of each 16 bytes of x, by the first 16 threads.
COPY = "SHARED_ARRAY(float[64], x); if (threadIdx.x < 16) "
COPY += "copy_async(x + 4 * threadIdx.x, p, true);"


def count_of(kernel: str, run) -> Count:
    with cuda_on_cpu():
        counts()
        run()
    (found,) = (count for name, count in counts().items() if name.startswith(kernel))
    return found


@seen
@pytest.mark.parametrize("adapted", [False, True])
def test_bytes_that_the_mixture_moves(adapted: bool) -> None:
    """[T, F] once; besides that of each block of 64 tokens the experts' matrices, of each range of
    columns the slots' rows."""
    T, K, E, F, R = 128, 2, 4, 512, 16
    plan = ops.moe_sort(some_experts(T, K, E, "uniform"), E)
    gate_TF, up_TF, dhbar_TF = (values(T, F, seed=i).bfloat16() for i in range(3))
    a_TKR, b_EFR, a_ERF = values(T, K, R).float(), values(E, F, R).float(), values(E, R, F).float()
    given = [a_TKR, a_TKR, b_EFR, b_EFR, a_ERF] if adapted else [None] * 5
    places = plan.expert_TK, plan.token_order_T, values(T, K).float()
    inputs = gate_TF, up_TF, *given, *places, *[None] * 4, E, 1.0, 0, 0.0, None
    dz_TKR = a_TKR if adapted else None

    experts = sum(
        len(order_T.unique()) for order_T in plan.expert_TK[plan.token_order_T.long()].split(64)
    )
    once, matrix, rows, index = 2 * T * F, 2 * experts * F * R, 2 * T * K * R, 4 * T * (2 * K + 1)
    found = count_of("glu_kernel", lambda: torch.ops.mixlora.shared_glu(*inputs))
    more = adapted * (3 * matrix + 16 * 2 * rows) + 16 * index
    assert 2 * once <= found.read_bytes <= 1.05 * 2 * once + more
    assert once <= found.written_bytes <= once + adapted * 16 * 2 * rows

    backward = torch.ops.mixlora.shared_glu_backward
    found = count_of("glu_backward_kernel", lambda: backward(dhbar_TF, dz_TKR, *inputs))
    sums = 3 * 4 * E * F * R  # of the one range of tokens
    more = adapted * (5 * matrix + 2 * 3 * rows + sums) + 2 * index
    assert 3 * once <= found.read_bytes <= 1.05 * 3 * once + more
    assert (
        2 * once
        <= found.written_bytes
        <= 2 * once + adapted * (sums + 2 * 2 * 2 * rows) + 2 * 32 * T * K
    )


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
    "a copy is not waited for": (
        COPY + "__syncthreads(); p[threadIdx.x] = x[threadIdx.x];",
        "a copy to this shared memory has not been waited for",
    ),
    "a copy is waited for too weakly": (
        COPY + "commit_copies(); wait_for_copies<1>(); __syncthreads();"
        "p[threadIdx.x] = x[threadIdx.x];",
        "a copy to this shared memory has not been waited for",
    ),
    "a copy is waited for before it is committed": (
        COPY + "wait_for_copies<0>(); __syncthreads(); p[threadIdx.x] = x[threadIdx.x];",
        "a copy to this shared memory has not been waited for",
    ),
    "a barrier is missing behind a copy": (
        COPY + "commit_copies(); __syncthreads(); wait_for_copies<0>(); p[threadIdx.x] = x[63];",
        "not ordered after an access|has not been waited for",
    ),
    "a copy overwrites what others read": (
        COPY + "commit_copies(); wait_for_copies<0>(); __syncthreads(); p[threadIdx.x] = x[63];"
        "copy_async(x + 4 * (threadIdx.x % 16), p, true); commit_copies(); wait_for_copies<0>();",
        "a store is not ordered after an access",
    ),
    "a copy that nobody waits for": (COPY + "commit_copies();", "ends without waiting for its"),
    "a copy is not aligned": (
        "SHARED_ARRAY(float[64], x); copy_async(x, p + 1, true);",
        "an address is no multiple of 16",
    ),
    "a copy out of shared memory": (
        "copy_async(p, p + 64, true);",
        "a copy's target is not in shared memory",
    ),
    "a copy ends beside its array": (
        "SHARED_ARRAY(float[62], x); copy_async(x + 60, p, true);",
        "beside a shared array",
    ),
    "a matrix of global memory": (
        "uint32_t x[4]; load_matrices<false>(x, p);",
        "ldmatrix reads what is not in shared memory",
    ),
    "a row of a matrix is not aligned": (
        "SHARED_ARRAY(float[64], x); uint32_t y[4]; load_matrices<false>(y, x + 1);",
        "an address is no multiple of 16",
    ),
    "a barrier is missing before a matrix is loaded": (
        "SHARED_ARRAY(float[256], x); for (int i = 0; i < 4; ++i) x[64 * i + threadIdx.x] = 1;"
        "uint32_t y[4]; load_matrices<true>(y, x + 4 * threadIdx.x);",
        "not ordered after an access|unwritten",
    ),
    "lanes that do not multiply": (
        "Sums sum; if (threadIdx.x % 32) multiply<Bf16>(sum, TileA{}, TileB{});",
        "mma is without some lanes",
    ),
    "an index out of range": (
        "const int i = threadIdx.x; CHECK_INDEX(i, 0, 63);",
        r"i must be in \[0, 63\), got 63",
    ),
}


def compiled(folder: Path, kernels: str, entry: str) -> ctypes.CDLL:
    """Kernels, and a function `run` that launches them in `queue`; it returns what is wrong."""
    source, library = folder / "kernels.cu", folder / "kernels.so"
    source.write_text(
        f"""#include "common/mma.cuh"
namespace mixlora {{
namespace {{
{kernels}
std::string error;
}}
extern "C" __attribute__((visibility("default"))) {entry}
}}"""
    )
    command = [CXX, *FLAGS.replace("-MMD", "").split(), "-O1", "-Wno-unused"]
    for file, *more in (source, "-fsanitize=thread", "-xc++"), (ROOT / "tests/cuda_on_cpu.cpp",):
        more += ["-c", str(file), "-o", str(folder / f"{file.name}.o")]
        subprocess.run(command + more, cwd=ROOT, check=True)
    subprocess.run([CXX, "-shared", *folder.glob("*.o"), "-o", library], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.run.restype = loaded.on_cpu_counts.restype = ctypes.c_char_p
    return loaded


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
    entry = f"""const char* run(int i, float* p) {{
      CudaQueue queue{{}};
      {launches}
      return (error = queue.error).c_str();
    }}"""
    run = compiled(tmp_path, kernels, entry).run
    run.argtypes = ctypes.c_int, ctypes.c_void_p
    memory = torch.zeros(1024)
    for i, (name, (_, message)) in enumerate(FAULTS.items()):
        said = run(i, memory.data_ptr()).decode()
        assert re.match(rf"kernel_{i}, block \(.*({message})", said), f"{name}: {said or 'nothing'}"
    assert run(len(FAULTS), memory.data_ptr()) == b""


# c = a b [16, 16] by one warp, 16 terms at a time, and c, rounded, times b's first rows; copies of
# the next terms are under way while it multiplies.
PRODUCT = """
template <class T, bool kTurnedA, bool kTurnedB>
__global__ void product_kernel(const T* a, const T* b, int num_terms, float* c, float* cb) {
  constexpr int kStride = 24;
  SHARED_ARRAY(T[2][2][16 * kStride], tiles);
  const int lane = threadIdx.x, row = lane / 2, column = lane % 2 * 8;
  const auto copy = [&](T* to, const T* from, bool terms_in_rows, int k) {
    const int term = terms_in_rows ? k + column : k + row;
    const T* p = from + (terms_in_rows ? row * num_terms + term : term * 16 + column);
    copy_async(to + row * kStride + column, p, term < num_terms);
  };
  const auto copy_both = [&](int i) {
    copy(tiles[i % 2][0], a, !kTurnedA, 16 * i);
    copy(tiles[i % 2][1], b, kTurnedB, 16 * i);
    commit_copies();
  };
  Sums sums[2], more[2];
  TileB b_tiles[2], first[2];
  const int steps = (num_terms + 15) / 16;
  copy_both(0);
  for (int i = 0; i < steps; ++i) {
    copy_both(i + 1);
    wait_for_copies<1>();
    __syncwarp();
    const TileA a_tile = load_a<kTurnedA>(tiles[i % 2][0], kStride);
    load_b<kTurnedB>(b_tiles, tiles[i % 2][1], kStride);
    for (int j = 0; j < 2; ++j) {
      if (i == 0) first[j] = b_tiles[j];
      multiply<T>(sums[j], a_tile, b_tiles[j]);
    }
    __syncwarp();
  }
  wait_for_copies<0>();
  const TileA c_tile = as_a<T>(sums[0], sums[1]);
  for (int j = 0; j < 2; ++j) {
    multiply<T>(more[j], c_tile, first[j]);
    for (int i = 0; i < 4; ++i) {
      const int at = sum_row(i) * 16 + 8 * j + sum_column(i);
      c[at] = sums[j].x[i];
      cb[at] = more[j].x[i];
    }
  }
}
"""


@pytest.mark.slow
@seen
def test_tensor_cores_and_copies(tmp_path: Path) -> None:
    """Both factors in either order in memory; the last terms are half a tile."""
    kinds = [(dtype, a, b) for dtype in ("Bf16", "Fp16") for a in (0, 1) for b in (0, 1)]
    launches = "".join(
        f"""if (i == {i}) launch<product_kernel<{dtype}, {turned_a}, {turned_b}>>(dim3(1), dim3(32),
            0, queue, (const {dtype}*)a, (const {dtype}*)b, num_terms, c, cb);\n"""
        for i, (dtype, turned_a, turned_b) in enumerate(kinds)
    )
    entry = f"""const char* run(
        int i, const void* a, const void* b, int num_terms, float* c, float* cb) {{
      CudaQueue queue{{}};
      {launches}
      return (error = queue.error).c_str();
    }}"""
    library = compiled(tmp_path, PRODUCT, entry)
    for i, (name, turned_a, turned_b) in enumerate(kinds):
        dtype = torch.bfloat16 if name == "Bf16" else torch.float16
        a, b = values(16, 40).to(dtype), values(40, 16, seed=1).to(dtype)
        stored_a, stored_b = (a.T if turned_a else a), (b.T if turned_b else b)
        c, cb = torch.full((2, 16, 16), torch.nan)
        inputs = [x.contiguous() for x in (stored_a, stored_b)]
        pointers = [ctypes.c_void_p(x.data_ptr()) for x in (*inputs, c, cb)]
        assert library.run(i, *pointers[:2], 40, *pointers[2:]) == b""
        assert_close(c, (a.double() @ b.double()).float())
        assert_close(cb, (c.to(dtype).double() @ b[:16].double()).float())
        name, launches, read, written, mmas = library.on_cpu_counts().decode().split("\t")
        assert (int(read), int(written), int(mmas)) == (2 * 2 * 640, 2 * 4 * 256, 2 * 3 + 2)


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
            "dropout": (x_TD, 0.5, slot_row_TK),
            "grouped_shrink": (x_TD, x_TD, False, slot_row_TK, slot_row_TK, slot_row_TK),
            "grouped_expand": (x_TD, x_TD, False, slot_row_TK, slot_row_TK, slot_row_TK),
            "grouped_outer": (x_TD, x_TD, False, slot_row_TK, slot_row_TK, slot_row_TK),
            "grouped_lora": (x_TD, x_TD, x_TD, slot_row_TK, 1.0),
            "shared_glu": (
                *(x_TD, x_TD, None, None, None, None, None, slot_row_TK, slot_row_TK, x_TD),
                *(None, None, None, None, 4, 1.0, 0, 0.0, None),
            ),
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
