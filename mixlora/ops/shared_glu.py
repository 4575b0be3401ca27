"""A mixture of LoRA experts between the frozen projections of a gated feed-forward.

W1 x and W3 x are computed once per token and shared by its experts; what goes into W2 is summed
over the experts first, since W2 is linear and shared (DESIGN: sum_k g_k W2 h_k = W2 sum_k g_k h_k).
Slot form: slot k of token t holds expert e = expert_TK[t, k] with weight g = weight_TK[t, k].

    gate_k = gate_TF[t] + s B1_e a_gate_TKR[t, k]           up_k = up_TF[t] + s B3_e a_up_TKR[t, k]
    h_k    = act(gate_k) * up_k
    hbar_TF[t]  = sum_k g h_k                                z_TKR[t, k] = A2_e dropout(h_k)

Given dhbar and dz, with nothing of size T x K x F saved (gate_k, up_k, h_k are computed again):

    dh_k = g dhbar + dropout'(A2_e^T dz_k)
    dup_k = dh_k * act(gate_k)       dgate_k = dh_k * up_k * act'(gate_k)
    dgate = sum_k dgate_k            dup = sum_k dup_k
    da_gate_k = s B1_e^T dgate_k     da_up_k = s B3_e^T dup_k
    dB1_e = s sum dgate_k a_gate_k^T     dB3_e = s sum dup_k a_up_k^T     dA2_e = sum dz_k h_k^T
    dg_k = <dhbar, h_k>              no division by g: exact at g = 0

gate, up: fp64, fp32, bf16 or fp16; the arithmetic inside is fp32 (fp64 for fp64), z and dg too.
A projection without adapter passes None for its two tensors. Empty slots (-1) add nothing and
have z = 0. Dropout on h_k before A2 is drawn by Philox from `seed`, an int64 scalar tensor.
"""

from collections.abc import Callable

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
) -> tuple[Tensor, Tensor | None]:
    """(hbar_TF in gate's dtype, z_TKR or None without a_down); see the module's docstring."""
    if act not in ACTIVATIONS:
        raise ValueError(f"shared_glu: act must be one of {', '.join(ACTIVATIONS)}, got {act!r}")
    if dropout and seed is None:
        raise ValueError(f"shared_glu: dropout {dropout} needs a seed (an int64 scalar tensor)")
    run = shared_glu_ref if use_reference() else _SharedGlu.apply
    return run(
        *(gate_TF, up_TF, a_gate_TKR, a_up_TKR, b_gate_EFR, b_up_EFR, a_down_ERF),
        *(plan, weight_TK, scaling, act, dropout, seed),
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
) -> tuple[Tensor, Tensor | None]:
    """By a loop over the experts under ordinary autograd, which saves everything."""
    T, K = plan.expert_TK.shape
    wide = torch.promote_types(gate_TF.dtype, torch.float32)
    hbar_TF = torch.zeros_like(gate_TF, dtype=wide)
    z_NR = None if a_down_ERF is None else hbar_TF.new_zeros(T * K, a_down_ERF.shape[1])
    for e in range(len(plan.expert_start_E1) - 1):
        t, k = torch.where(plan.expert_TK == e)
        gate_F, up_F = gate_TF[t].to(wide), up_TF[t].to(wide)
        if a_gate_TKR is not None:
            gate_F = gate_F + scaling * a_gate_TKR[t, k].to(wide) @ b_gate_EFR[e].to(wide).T
        if a_up_TKR is not None:
            up_F = up_F + scaling * a_up_TKR[t, k].to(wide) @ b_up_EFR[e].to(wide).T
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
        plan, weight_TK, *options = rest
        tensors = gate_TF, up_TF, a_gate_TKR, a_up_TKR, b_gate_EFR, b_up_EFR, a_down_ERF, weight_TK
        ctx.save_for_backward(*tensors)
        ctx.plan, ctx.options = plan, options
        T, K = plan.expert_TK.shape
        expert = _Expert(tensors, plan, *options)
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
        tensors, plan = ctx.saved_tensors, ctx.plan
        gate_TF, up_TF, a_gate_TKR, a_up_TKR, b_gate_EFR, b_up_EFR, a_down_ERF, weight_TK = tensors
        expert = _Expert(tensors, plan, *ctx.options)
        s, act_backward = expert.scaling, expert.act_backward

        def zeros(x: Tensor | None) -> Tensor | None:
            return None if x is None else torch.zeros(x.shape, dtype=expert.wide, device=x.device)

        d_gate, d_up, d_weight = zeros(gate_TF), zeros(up_TF), zeros(weight_TK)
        d_a_gate, d_a_up, d_b_gate, d_b_up, d_a_down = map(zeros, tensors[2:7])
        for e, token, slot in expert_rows(plan):
            gate_k, up_k, act_k, h_F, g = expert.hidden(e, token, slot)
            dhbar_F = dhbar_TF[token].to(expert.wide)
            d_weight.view(-1)[slot] = (dhbar_F * h_F).sum(-1)
            dh_F = g * dhbar_F
            if a_down_ERF is not None:
                dz_R = dz_TKR.flatten(0, 1)[slot]
                dh_F += expert.dropped(dz_R @ a_down_ERF[e].to(expert.wide), slot)
                d_a_down[e] = dz_R.T @ expert.dropped(h_F, slot)
            dup_F, dgate_F = dh_F * act_k, act_backward(dh_F * up_k, gate_k)
            d_gate.index_add_(0, token, dgate_F)
            d_up.index_add_(0, token, dup_F)
            for dy_F, a_TKR, b_EFR, d_a, d_b in (
                (dgate_F, a_gate_TKR, b_gate_EFR, d_a_gate, d_b_gate),
                (dup_F, a_up_TKR, b_up_EFR, d_a_up, d_b_up),
            ):
                if a_TKR is not None:
                    d_a.flatten(0, 1)[slot] = s * dy_F @ b_EFR[e].to(expert.wide)
                    d_b[e] = s * dy_F.T @ a_TKR.flatten(0, 1)[slot].to(expert.wide)
        gradients = d_gate, d_up, d_a_gate, d_a_up, d_b_gate, d_b_up, d_a_down, d_weight
        *first, last = (
            None if d is None else d.to(x.dtype) for d, x in zip(gradients, tensors, strict=True)
        )
        return *first, None, last, *(None for _ in ctx.options)


class _Expert:
    """What one expert makes of its rows: forward and backward both ask, nothing is kept."""

    def __init__(self, tensors, plan, scaling, act, dropout, seed):
        self.gate_TF, self.up_TF, self.a_gate_TKR, self.a_up_TKR, *rest = tensors
        self.b_gate_EFR, self.b_up_EFR, _, self.weight_TK = rest
        self.wide = torch.promote_types(self.gate_TF.dtype, torch.float32)
        self.scaling, self.p, self.seed = scaling, dropout, seed
        self.act, self.act_backward = ACTIVATIONS[act]

    def hidden(self, e: int, token: Tensor, slot: Tensor) -> tuple[Tensor, ...]:
        """gate_k, up_k, act(gate_k), h_k [rows, F] and g [rows, 1] of expert e's rows."""
        gate_k = self._adapted(self.gate_TF, self.a_gate_TKR, self.b_gate_EFR, e, token, slot)
        up_k = self._adapted(self.up_TF, self.a_up_TKR, self.b_up_EFR, e, token, slot)
        act_k = self.act(gate_k)
        return gate_k, up_k, act_k, act_k * up_k, self.weight_TK.flatten()[slot, None]

    def dropped(self, x_F: Tensor, slot: Tensor) -> Tensor:
        if not self.p:
            return x_F
        return x_F * keep_mask(self.seed, slot, x_F.shape[1], self.p) / (1 - self.p)

    def _adapted(self, y_TF, a_TKR, b_EFR, e, token, slot):
        y_F = y_TF[token].to(self.wide)
        if a_TKR is None:
            return y_F
        a_R = a_TKR.flatten(0, 1)[slot].to(self.wide)
        return torch.addmm(y_F, a_R, b_EFR[e].to(self.wide).T, alpha=self.scaling)
