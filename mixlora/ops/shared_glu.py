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
A projection without adapter passes None for its two tensors. Empty slots (-1) add nothing and
have z = 0. Dropout on h_k before A2 is drawn by Philox from `seed`, an int64 scalar tensor.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mixlora.ops._switch import use_reference
from mixlora.ops.grouped_lora import expert_rows
from mixlora.ops.moe_sort import Plan
from mixlora.ops.philox import keep_mask

# name -> (function, its backward from the output's gradient and the input)
ACTIVATIONS: dict[str, tuple[Callable, Callable]] = {
    "silu": (F.silu, torch.ops.aten.silu_backward),
    "gelu": (F.gelu, torch.ops.aten.gelu_backward),
    "gelu_pytorch_tanh": (
        lambda x: F.gelu(x, approximate="tanh"),
        lambda dy, x: torch.ops.aten.gelu_backward(dy, x, approximate="tanh"),
    ),
    "relu": (F.relu, lambda dy, x: torch.ops.aten.threshold_backward(dy, x, 0)),
}


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
    if use_reference():
        return shared_glu_ref(
            *(gate_TF, up_TF, a_gate_TKR, a_up_TKR, b_gate_EFR, b_up_EFR, a_down_ERF),
            *(plan, weight_TK, scaling, act, dropout, seed),
            scale_gate_EF=scale_gate_EF,
            scale_up_EF=scale_up_EF,
            bias_gate_F=bias_gate_F,
            bias_up_F=bias_up_F,
        )
    return _SharedGlu.apply(
        *(gate_TF, up_TF, a_gate_TKR, a_up_TKR, b_gate_EFR, b_up_EFR, a_down_ERF),
        *(weight_TK, scale_gate_EF, scale_up_EF),
        *(plan, scaling, act, dropout, seed, bias_gate_F, bias_up_F),
    )


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
        h_F = ACTIVATIONS[act][0](gate_F) * up_F
        hbar_TF = hbar_TF.index_add(0, t, weight_TK[t, k, None] * h_F)
        if dropout:
            h_F = h_F * keep_mask(seed, t * K + k, h_F.shape[1], dropout) / (1 - dropout)
        if z_NR is not None:
            z_NR = z_NR.index_copy(0, t * K + k, h_F @ a_down_ERF[e].to(wide).T)
    return hbar_TF.to(gate_TF.dtype), None if z_NR is None else z_NR.unflatten(0, (T, K))


class _SharedGlu(torch.autograd.Function):
    """Saves its inputs; N below counts slots, t * K + k."""

    @staticmethod
    def forward(ctx, gate_TF, up_TF, a_gate_TKR, a_up_TKR, b_gate_EFR, b_up_EFR, a_down_ERF, *rest):
        *more, plan, scaling, act, dropout, seed, bias_gate_F, bias_up_F = rest
        tensors = gate_TF, up_TF, a_gate_TKR, a_up_TKR, b_gate_EFR, b_up_EFR, a_down_ERF, *more
        ctx.save_for_backward(*tensors)
        ctx.plan, ctx.options = plan, (scaling, act, dropout, seed, bias_gate_F, bias_up_F)
        T, K = plan.expert_TK.shape
        expert = _Expert(tensors, *ctx.options)
        hbar_TF = torch.zeros_like(gate_TF, dtype=expert.wide)
        z_NR = None if a_down_ERF is None else hbar_TF.new_zeros(T * K, a_down_ERF.shape[1])
        for e, token, slot in expert_rows(plan):
            *_, h_F, g = expert.hidden(e, token, slot)
            hbar_TF.index_add_(0, token, g * h_F)
            if z_NR is not None:
                z_NR[slot] = expert.dropped(h_F, slot) @ a_down_ERF[e].to(expert.wide).T
        return hbar_TF.to(gate_TF.dtype), None if z_NR is None else z_NR.unflatten(0, (T, K))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dhbar_TF, dz_TKR):
        tensors = ctx.saved_tensors
        expert, a_down_ERF = _Expert(tensors, *ctx.options), tensors[6]
        s, wide = expert.scaling, expert.wide
        gradients = [
            None if x is None else torch.zeros(x.shape, dtype=wide, device=x.device)
            for x in tensors
        ]
        *_, d_a_down, d_weight, _, _ = gradients
        for e, token, slot in expert_rows(ctx.plan):
            gate, up, act_F, h_F, g = expert.hidden(e, token, slot)
            dhbar_F = dhbar_TF[token].to(wide)
            d_weight.view(-1)[slot] = (dhbar_F * h_F).sum(-1)
            dh_F = g * dhbar_F
            if a_down_ERF is not None:
                dz_R = dz_TKR.flatten(0, 1)[slot]
                dh_F += expert.dropped(dz_R @ a_down_ERF[e].to(wide), slot)
                d_a_down[e] = dz_R.T @ expert.dropped(h_F, slot)
            dgate_F = expert.act_backward(dh_F * up.y_F, gate.y_F)
            for i, side, dy_F in ((0, gate, dgate_F), (1, up, dh_F * act_F)):
                d_base, d_a, d_b, d_scale = (gradients[j + i] for j in (0, 2, 4, 8))
                a_TKR, b_EFR, scale_EF = (tensors[j + i] for j in (2, 4, 8))
                if scale_EF is not None:
                    d_scale[e] = (dy_F * side.before_scale_F).sum(0)
                    dy_F = dy_F * scale_EF[e].to(wide)
                d_base.index_add_(0, token, dy_F)
                if a_TKR is not None:
                    d_a.flatten(0, 1)[slot] = s * dy_F @ b_EFR[e].to(wide)
                    d_b[e] = s * dy_F.T @ a_TKR.flatten(0, 1)[slot].to(wide)
        pairs = zip(gradients, tensors, strict=True)
        return *(None if d is None else d.to(x.dtype) for d, x in pairs), *[None] * 7


class _Side(NamedTuple):
    """gate_k or up_k of an expert's rows."""

    y_F: Tensor
    before_scale_F: Tensor  # y_F itself without DoRA


class _Expert:
    """What one expert makes of its rows: forward and backward both ask, nothing is kept."""

    def __init__(self, tensors, scaling, act, dropout, seed, bias_gate_F, bias_up_F):
        self.gate, self.up = ((*tensors[i:6:2], tensors[8 + i]) for i in (0, 1))
        self.weight_TK, self.bias_gate_F, self.bias_up_F = tensors[7], bias_gate_F, bias_up_F
        self.wide = torch.promote_types(tensors[0].dtype, torch.float32)
        self.scaling, self.p, self.seed = scaling, dropout, seed
        self.act, self.act_backward = ACTIVATIONS[act]

    def hidden(self, e: int, token: Tensor, slot: Tensor) -> tuple:
        """gate_k, up_k as sides, act(gate_k), h_k [rows, F] and g [rows, 1] of e's rows."""
        gate = self._side(*self.gate, self.bias_gate_F, e, token, slot)
        up = self._side(*self.up, self.bias_up_F, e, token, slot)
        act_F = self.act(gate.y_F)
        return gate, up, act_F, act_F * up.y_F, self.weight_TK.flatten()[slot, None]

    def dropped(self, x_F: Tensor, slot: Tensor) -> Tensor:
        if not self.p:
            return x_F
        return x_F * keep_mask(self.seed, slot, x_F.shape[1], self.p) / (1 - self.p)

    def _side(self, y_TF, a_TKR, b_EFR, scale_EF, bias_F, e, token, slot) -> _Side:
        y_F = y_TF[token].to(self.wide)
        if a_TKR is None:
            return _Side(y_F, y_F)
        bias_F = None if scale_EF is None or bias_F is None else bias_F.to(self.wide)
        if bias_F is not None:
            y_F = y_F - bias_F
        a_R = a_TKR.flatten(0, 1)[slot].to(self.wide)
        y_F = torch.addmm(y_F, a_R, b_EFR[e].to(self.wide).T, alpha=self.scaling)
        if scale_EF is None:
            return _Side(y_F, y_F)
        scaled_F = y_F * scale_EF[e].to(self.wide)
        return _Side(scaled_F if bias_F is None else scaled_F + bias_F, y_F)
