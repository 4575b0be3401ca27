"""MixLoRA (arXiv 2404.15159): LoRA experts around one frozen feed-forward, chosen by a router.

    y = sum_k g_k FFN_ek(x),   FFN_e: W1 (gate), W3 (up), W2 (down), each with a LoRA of expert e
      = W2 (sum_k g_k h_k) + sum_k B2_ek (s g_k A2_ek h_k)

The second line is exact and costs one frozen feed-forward whatever K is: see ops/shared_glu.py.
With DoRA on W2 (MixDoRA) every expert scales the rows of W2 for itself, and W2 runs on each h_k.
"""

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixlora.layers.context import ForwardContext, Span
from mixlora.layers.lora import Linear, LoraPair, rescale
from mixlora.layers.router import Router
from mixlora.ops import (
    ACTIVATIONS,
    Plan,
    Routing,
    grouped_lora,
    grouped_shrink,
    linear,
    moe_gather,
    moe_scatter,
    moe_sort,
    shared_glu,
)

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
Finish = Callable[[Tensor], Tensor]  # W2 h + b2, rows as in h -> y_TD


class FeedForward(nn.Module):
    """W2 (act(W1 x) * W3 x) of a transformer block, and the mixtures around it by adapter name."""

    def __init__(self, hidden_size: int, ffn_size: int, act: str, bias: bool = False) -> None:
        super().__init__()
        self.act = act
        self.gate_proj = Linear(hidden_size, ffn_size, bias)
        self.up_proj = Linear(hidden_size, ffn_size, bias)
        self.down_proj = Linear(ffn_size, hidden_size, bias)
        self.mixtures = nn.ModuleDict()

    def forward(self, x_BSD: Tensor, context: ForwardContext) -> Tensor:
        """Each frozen product once over all rows; each mixture works on its own rows."""
        gate_BSF, up_BSF = self.gate_proj(x_BSD, context), self.up_proj(x_BSD, context)
        parts = [self._hidden(span, x_BSD, gate_BSF, up_BSF, context) for span in context.spans]
        hidden, finishes = zip(*parts, strict=True)
        h_NF = hidden[0] if len(hidden) == 1 else torch.cat(hidden)
        y_ND = linear(h_NF, self.down_proj.weight, self.down_proj.bias)
        if len(parts) == 1:
            return finishes[0](y_ND).view_as(x_BSD)
        ends = list(itertools.accumulate(map(len, hidden), initial=0))
        finished = [
            finish(y_ND[start:end])
            for finish, (start, end) in zip(finishes, itertools.pairwise(ends), strict=True)
        ]
        return torch.cat(finished).view_as(x_BSD)

    def _hidden(
        self, span: Span, x_BSD: Tensor, gate_BSF: Tensor, up_BSF: Tensor, context: ForwardContext
    ) -> tuple[Tensor, Finish]:
        """What enters W2 for a span's tokens, as many rows as it likes, and what becomes of W2's
        output."""
        rows = (span.rows(x).flatten(0, 1) for x in (x_BSD, gate_BSF, up_BSF))
        x_TD, gate_TF, up_TF = rows
        if span.name in self.mixtures:
            mixture = self.mixtures[span.name]
            sequences = context.sequences(span, self)
            routing = mixture.moe_gate(x_TD, sequences)
            context.routing.setdefault((span, self), routing)
            return mixture(self, x_TD, gate_TF, up_TF, routing)
        h_TF = ACTIVATIONS[self.act](gate_TF) * up_TF
        return h_TF, lambda y_TD: self.down_proj.adapt(span, h_TF, y_TD, context)


class MixLora(nn.Module):
    """One adapter's router and experts in one feed-forward. Untargeted projections hold None."""

    def __init__(
        self,
        ffn: FeedForward,
        router: Router,
        *,
        projections: tuple[str, ...],
        act_fn: str | None = None,
        **lora,
    ) -> None:
        super().__init__()
        self.num_experts, self.act = router.num_experts, act_fn or ffn.act
        self.moe_gate = router
        self.scaling, self.dropout = 1.0, 0.0
        self.gate_proj = self.up_proj = self.down_proj = None
        for name in projections:
            experts = Experts(getattr(ffn, name), router.num_experts, **lora)
            setattr(self, name, experts)
            self.scaling, self.dropout = experts.scaling, experts.dropout

    def forward(
        self, ffn: FeedForward, x_TD: Tensor, gate_TF: Tensor, up_TF: Tensor, routing: Routing
    ) -> tuple[Tensor, Finish]:
        """(h_NF, finish): y = finish(W2 h + b2). gate and up are W1 x + b1 and W3 x + b3.

        In training one dropout mask per token on the input of A1 and A3, shared by its experts,
        and one on each h_k.
        """
        plan = moe_sort(routing.expert_TK, self.num_experts)
        is_routed = self.down_proj is not None and self.down_proj.lora_magnitude_vector is not None
        path = self._routed if is_routed else self._shared
        h_NF, finish = path(ffn, x_TD, gate_TF, up_TF, plan, routing)
        return h_NF, lambda y_ND: self._with_skipped(finish(y_ND), x_TD, routing.skip_T)

    def _shared(self, ffn, x_TD, gate_TF, up_TF, plan, routing) -> tuple[Tensor, Finish]:
        """W2 once per token, on sum_k g_k h_k."""
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        dropout = self.dropout if self.training else 0.0
        seed = torch.randint(2**62, (), device=x_TD.device) if dropout else None
        dropped_TD = F.dropout(x_TD, dropout)
        a_gate_TKR = gate and grouped_shrink(dropped_TD, gate.lora_A.to(x_TD.dtype), plan)
        a_up_TKR = up and grouped_shrink(dropped_TD, up.lora_A.to(x_TD.dtype), plan)
        hbar_TF, z_TKR = shared_glu(
            *(gate_TF, up_TF, a_gate_TKR, a_up_TKR),
            *(gate and gate.lora_B, up and up.lora_B, down and down.lora_A),
            *(plan, routing.weight_TK, self.scaling, self.act, dropout, seed),
            scale_gate_EF=gate and gate.dora_scale(ffn.gate_proj),
            scale_up_EF=up and up.dora_scale(ffn.up_proj),
            bias_gate_F=ffn.gate_proj.bias,
            bias_up_F=ffn.up_proj.bias,
        )
        delta_TD = None
        if down is not None:
            scaled_TKR = z_TKR * (self.scaling * routing.weight_TK[..., None])
            delta_TD = down.expand(scaled_TKR.to(x_TD.dtype), routing.expert_TK)

        def finish(y_TD: Tensor) -> Tensor:
            if delta_TD is not None:
                y_TD.add_(delta_TD)
            if ffn.down_proj.bias is None:
                return y_TD
            extra_T1 = routing.weight_TK.sum(-1, keepdim=True) - 1  # b2 enters as (sum_k g_k) b2
            return y_TD.add_(extra_T1.to(y_TD.dtype) * ffn.down_proj.bias)

        return hbar_TF, finish

    def _routed(self, ffn, x_TD, gate_TF, up_TF, plan, routing) -> tuple[Tensor, Finish]:
        """W2 on rows sorted by expert, one per token and expert; W1 and W3 once per token."""
        expert_N = _experts_of_rows(plan)
        x_ND = moe_gather(F.dropout(x_TD, self.dropout, self.training), plan)
        gate_NF, up_NF = moe_gather(gate_TF, plan), moe_gather(up_TF, plan)
        if self.gate_proj is not None:
            gate_NF = self.gate_proj.adapt(x_ND, gate_NF, ffn.gate_proj, plan, expert_N)
        if self.up_proj is not None:
            up_NF = self.up_proj.adapt(x_ND, up_NF, ffn.up_proj, plan, expert_N)
        h_NF = ACTIVATIONS[self.act](gate_NF) * up_NF

        def finish(y_ND: Tensor) -> Tensor:
            dropped_NF = F.dropout(h_NF, self.dropout, self.training)
            y_ND = self.down_proj.adapt(dropped_NF, y_ND, ffn.down_proj, plan, expert_N)
            return moe_scatter(y_ND, plan, routing.weight_TK)

        return h_NF, finish

    def _with_skipped(self, y_TD: Tensor, x_TD: Tensor, skip_T: Tensor | None) -> Tensor:
        if skip_T is not None:
            y_TD = y_TD + skip_T[:, None].to(x_TD.dtype) * x_TD
        return F.dropout(y_TD, getattr(self.moe_gate, "ffn_dropout", 0.0), self.training)


class Experts(LoraPair):
    """One projection's LoRA pairs of all experts, stacked: each is always in the graph."""

    def expand(self, z_TKR: Tensor, expert_TK: Tensor) -> Tensor:
        """sum_k B_ek z_k [T, O] as one product: z in its expert's columns, zero elsewhere."""
        T, K, R = z_TKR.shape
        E = len(self.lora_B)
        column_TKR = torch.where(expert_TK < 0, E, expert_TK.long())[..., None].expand(T, K, R)
        z_TER = z_TKR.new_zeros(T, E + 1, R).scatter(1, column_TKR, z_TKR)[:, :E]
        return linear(z_TER.flatten(1), self.lora_B.to(z_TKR.dtype).transpose(0, 1).flatten(1))

    def adapt(
        self, x_NI: Tensor, y_NO: Tensor, base: Linear, plan: Plan, expert_N: Tensor
    ) -> Tensor:
        """y = W x + b of rows sorted by expert, each with its expert's update."""
        lora_a, lora_b = self.lora_A.to(x_NI.dtype), self.lora_B.to(x_NI.dtype)
        delta_NO = grouped_lora(x_NI, lora_a, lora_b, plan.expert_start_E1, self.scaling)
        scale_EO = self.dora_scale(base)
        if scale_EO is None:
            return y_NO + delta_NO
        return rescale(y_NO, delta_NO, scale_EO.index_select(0, expert_N), base)


def _experts_of_rows(plan: Plan) -> Tensor:
    """The expert of every row; 0 behind the valid rows, whose slot is nobody's."""
    expert_N = plan.expert_TK.flatten().index_select(0, plan.row_slot_N.clamp_min(0).long())
    return expert_N.clamp_min(0).long()
