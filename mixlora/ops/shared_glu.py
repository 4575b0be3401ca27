"""A mixture of LoRA experts between the frozen projections of a gated feed-forward.

W1 x and W3 x are computed once per token and shared by its experts; what goes into W2 is summed
over the experts first, since W2 is linear and shared (DESIGN: sum_k g_k W2 h_k = W2 sum_k g_k h_k).
Slot form: slot k of token t holds expert e = expert_TK[t, k] with weight g = weight_TK[t, k].

    gate_k = gate_TF[t] + s B1_e a_gate_TKR[t, k]           up_k = up_TF[t] + s B3_e a_up_TKR[t, k]
    h_k    = act(gate_k) * up_k
    hbar_TF[t]  = sum_k g h_k                                z_TKR[t, k] = A2_e dropout(h_k)

With DoRA (arXiv 2402.09353) the sum is scaled row by row, the frozen bias b apart (gate_TF holds
it): gate_k = m1_e (gate_TF[t] - b + s B1_e a_gate_TKR[t, k]) + b, m1 = scale_gate_EF; so is up.

Given dhbar and dz, with nothing of size T x K x F saved (gate_k, up_k, h_k are computed again):

    dh_k = g dhbar + dropout'(A2_e^T dz_k)
    dup_k = dh_k * act(gate_k)       dgate_k = dh_k * up_k * act'(gate_k)
    dgate = sum_k dgate_k            dup = sum_k dup_k
    da_gate_k = s B1_e^T dgate_k     da_up_k = s B3_e^T dup_k
    dB1_e = s sum dgate_k a_gate_k^T     dB3_e = s sum dup_k a_up_k^T     dA2_e = sum dz_k h_k^T
    dg_k = <dhbar, h_k>              no division by g: exact at g = 0
    DoRA: dm1_e = sum dgate_k * (gate_k before m1), and m1_e dgate_k stands for dgate_k above

gate, up: fp64, fp32, bf16 or fp16; the arithmetic inside is fp32 (fp64 for fp64), z and dg too.
Beside bf16, a processor with products of bf16, as tensor cores, takes factors rounded to bf16 and
sums in fp32.
A projection without adapter passes None for its two tensors. Empty slots (-1) add nothing and
have z = 0. Dropout on h_k before A2 is drawn by Philox from `seed`, an int64 scalar tensor.
"""

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mixlora.ops._once import no_second_derivative
from mixlora.ops._switch import use_reference
from mixlora.ops.moe_sort import Plan
from mixlora.ops.philox import keep_mask

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
IN_KERNELS = tuple(ACTIVATIONS)  # in the order of csrc/common/activation.h


def shared_glu(
    gate_TF: Tensor,
    up_TF: Tensor,
    a_gate_TKR: Tensor | None,
    a_up_TKR: Tensor | None,
    b_gate_EFR: Tensor | None,
    b_up_EFR: Tensor | None,
    a_down_ERF: Tensor | None,
    plan: Plan,
    weight_TK: Tensor,
    scaling: float,
    act: str = "silu",
    dropout: float = 0.0,
    seed: Tensor | None = None,
    *,
    scale_gate_EF: Tensor | None = None,
    scale_up_EF: Tensor | None = None,
    bias_gate_F: Tensor | None = None,
    bias_up_F: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(hbar_TF in gate's dtype, z_TKR or None without a_down); see the module's docstring.

    The biases are read only beside a scale, which leaves them out, and get no gradient.
    """
    if act not in ACTIVATIONS:
        raise ValueError(f"shared_glu: act must be one of {', '.join(ACTIVATIONS)}, got {act!r}")
    if dropout and seed is None:
        raise ValueError(f"shared_glu: dropout {dropout} needs a seed (an int64 scalar tensor)")
    reference = use_reference()
    if act not in IN_KERNELS and not reference:
        warnings.warn(f"shared_glu: {act} has no kernel, the reference computes it", stacklevel=2)
        reference = True
    if reference:
        return shared_glu_ref(
            *(gate_TF, up_TF, a_gate_TKR, a_up_TKR, b_gate_EFR, b_up_EFR, a_down_ERF),
            *(plan, weight_TK, scaling, act, dropout, seed),
            scale_gate_EF=scale_gate_EF,
            scale_up_EF=scale_up_EF,
            bias_gate_F=bias_gate_F,
            bias_up_F=bias_up_F,
        )
    dtype = gate_TF.dtype
    wide = torch.promote_types(dtype, torch.float32)
    if dtype == torch.float16:
        gate_TF, up_TF = gate_TF.float(), up_TF.float()

    def widened(*tensors: Tensor | None) -> list[Tensor | None]:
        return [x if x is None or x.dtype == wide else x.to(wide) for x in tensors]

    hbar_TF, z_TKR = torch.ops.mixlora.shared_glu(
        *(gate_TF, up_TF),
        *widened(a_gate_TKR, a_up_TKR, b_gate_EFR, b_up_EFR, a_down_ERF),
        *(plan.expert_TK, plan.token_order_T),
        *widened(weight_TK, scale_gate_EF, scale_up_EF, bias_gate_F, bias_up_F),
        *(len(plan.expert_start_E1) - 1, scaling, IN_KERNELS.index(act), dropout, seed),
    )
    return hbar_TF.to(dtype), None if a_down_ERF is None else z_TKR


def shared_glu_ref(
    gate_TF: Tensor,
    up_TF: Tensor,
    a_gate_TKR: Tensor | None,
    a_up_TKR: Tensor | None,
    b_gate_EFR: Tensor | None,
    b_up_EFR: Tensor | None,
    a_down_ERF: Tensor | None,
    plan: Plan,
    weight_TK: Tensor,
    scaling: float,
    act: str = "silu",
    dropout: float = 0.0,
    seed: Tensor | None = None,
    *,
    scale_gate_EF: Tensor | None = None,
    scale_up_EF: Tensor | None = None,
    bias_gate_F: Tensor | None = None,
    bias_up_F: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """By a loop over the experts under ordinary autograd, which saves everything."""
    T, K = plan.expert_TK.shape
    wide = torch.promote_types(gate_TF.dtype, torch.float32)

    def adapted(y_TF, a_TKR, b_EFR, scale_EF, bias_F, e, t, k) -> Tensor:
        y_F, bias_F = y_TF[t].to(wide), 0 if bias_F is None else bias_F.to(wide)
        if a_TKR is None:
            return y_F
        delta_F = scaling * a_TKR[t, k].to(wide) @ b_EFR[e].to(wide).T
        return (
            y_F + delta_F if scale_EF is None else scale_EF[e] * (y_F - bias_F + delta_F) + bias_F
        )

    hbar_TF = torch.zeros_like(gate_TF, dtype=wide)
    z_NR = None if a_down_ERF is None else hbar_TF.new_zeros(T * K, a_down_ERF.shape[1])
    for e in range(len(plan.expert_start_E1) - 1):
        t, k = torch.where(plan.expert_TK == e)
        gate_F = adapted(gate_TF, a_gate_TKR, b_gate_EFR, scale_gate_EF, bias_gate_F, e, t, k)
        up_F = adapted(up_TF, a_up_TKR, b_up_EFR, scale_up_EF, bias_up_F, e, t, k)
        h_F = ACTIVATIONS[act](gate_F) * up_F
        hbar_TF = hbar_TF.index_add(0, t, weight_TK[t, k, None] * h_F)
        if dropout:
            h_F = h_F * keep_mask(seed, t * K + k, h_F.shape[1], dropout) / (1 - dropout)
        if z_NR is not None:
            z_NR = z_NR.index_copy(0, t * K + k, h_F @ a_down_ERF[e].to(wide).T)
    return hbar_TF.to(gate_TF.dtype), None if z_NR is None else z_NR.unflatten(0, (T, K))


@torch.library.register_fake("mixlora::shared_glu")
def _(gate_TF, up_TF, a_gate_TKR, a_up_TKR, b_gate_EFR, b_up_EFR, a_down_ERF, expert_TK, *rest):
    rank = 0 if a_down_ERF is None else a_down_ERF.shape[1]
    wide = torch.promote_types(gate_TF.dtype, torch.float32)
    z_TKR = gate_TF.new_empty(*expert_TK.shape, rank, dtype=wide)
    return gate_TF.new_empty(gate_TF.shape), z_TKR


@torch.library.register_fake("mixlora::shared_glu_backward")
def _(dhbar_TF, dz_TKR, *inputs):
    return [inputs[0].new_empty(0) if x is None else x.new_empty(x.shape) for x in _learned(inputs)]


def _learned(inputs: tuple) -> list[Tensor | None]:
    """Those of the op's inputs that get a gradient."""
    return [*inputs[:7], *inputs[9:12]]


def _setup_context(ctx, inputs, output) -> None:
    *tensors, num_experts, scaling, act, dropout, seed = inputs
    ctx.save_for_backward(*tensors, seed)
    ctx.options = num_experts, scaling, act, dropout


def _backward(ctx, dhbar_TF, dz_TKR):
    *tensors, seed = ctx.saved_tensors
    dz_TKR = None if tensors[6] is None else dz_TKR
    inputs = *tensors, *ctx.options, seed
    found = torch.ops.mixlora.shared_glu_backward(dhbar_TF, dz_TKR, *inputs)
    pairs = zip(found, _learned(inputs), strict=True)
    gradients = [None if x is None else gradient for gradient, x in pairs]
    return *gradients[:7], None, None, *gradients[7:], *[None] * 7


torch.library.register_autograd("mixlora::shared_glu", _backward, setup_context=_setup_context)
no_second_derivative("shared_glu_backward")
