"""MixLoRA (arXiv 2404.15159): LoRA experts around one frozen feed-forward, chosen by a router.

    y = sum_k g_k FFN_ek(x),   FFN_e: W1 (gate), W3 (up), W2 (down), each with a LoRA of expert e
      = W2 (sum_k g_k h_k) + sum_k B2_ek (s g_k A2_ek h_k)

The second line is exact and costs one frozen feed-forward whatever K is: see ops/shared_glu.py.
With DoRA on W2 (MixDoRA) every expert scales the rows of W2 for itself, and W2 runs on each h_k.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mixlora.layers.context import ForwardContext, Sequences, Span, put_together, rows_of, split
from mixlora.layers.lora import Linear, LoraPair, of_dropped, rescale
from mixlora.layers.router import Router
from mixlora.ops import (
    ACTIVATIONS,
    Plan,
    Routing,
    dropout,
    grouped_expand,
    grouped_shrink,
    moe_gather,
    moe_scatter,
    moe_sort,
    shared_glu,
)
from mixlora.ops.philox import seed_tensor

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
        if context.recompute_ffn:
            return checkpoint(self._forward, x_BSD, context, use_reentrant=False)
        return self._forward(x_BSD, context)

    def _forward(self, x_BSD: Tensor, context: ForwardContext) -> Tensor:
        """Each frozen product once over all rows; each mixture works on its own rows."""
        gate_BSF, up_BSF = self.gate_proj(x_BSD, context), self.up_proj(x_BSD, context)
        inputs = zip(*(rows_of(context.spans, x) for x in (x_BSD, gate_BSF, up_BSF)), strict=True)
        parts = [
            self._hidden(span, *(x.flatten(0, 1) for x in rows), context)
            for span, rows in zip(context.spans, inputs, strict=True)
        ]
        hidden, finishes = zip(*parts, strict=True)
        h_NF = hidden[0] if len(hidden) == 1 else torch.cat(hidden)
        y_ND = self.down_proj.product(h_NF)
        sections = split(y_ND, [len(h_NF) for h_NF in hidden])
        S, finished = x_BSD.shape[1], []
        for span, finish, y_ND in zip(context.spans, finishes, sections, strict=True):
            finished.append(finish(y_ND).unflatten(0, (span.end - span.start, span.length or S)))
        return put_together(finished, S)

    def _hidden(
        self, span: Span, x_TD: Tensor, gate_TF: Tensor, up_TF: Tensor, context: ForwardContext
    ) -> tuple[Tensor, Finish]:
        """What enters W2 for a span's tokens, as many rows as it likes, and what becomes of W2's
        output."""
        names = [name for name in context.adapters_of(span) if name in self.mixtures]
        parts = [self._mixed(name, x_TD, gate_TF, up_TF, span, context) for name in names]
        stacked = [context.stacked[span, name] for name in names if span.name is None]
        if parts and all(rows.is_all for rows in stacked):
            return parts[0]
        plain = self._plain(gate_TF, up_TF, span, context)
        return joined(plain, parts, [rows.member_T for rows in stacked]) if parts else plain

    def _mixed(
        self,
        name: str,
        x_TD: Tensor,
        gate_TF: Tensor,
        up_TF: Tensor,
        span: Span,
        context: ForwardContext,
    ) -> tuple[Tensor, Finish]:
        sequences = context.sequences(span, self)
        routing = self.mixtures[name].moe_gate(x_TD, sequences)
        if span.name == name:
            context.routing.setdefault((span, self), routing)
        return self.mixtures[name](self, x_TD, gate_TF, up_TF, routing, sequences)

    def _plain(
        self, gate_TF: Tensor, up_TF: Tensor, span: Span, context: ForwardContext
    ) -> tuple[Tensor, Finish]:
        if torch.is_grad_enabled():  # cheap to repeat: what is kept for backward is gate and up
            options = {"use_reentrant": False, "preserve_rng_state": False}
            h_TF = checkpoint(self._glu, gate_TF, up_TF, **options)
        else:
            h_TF = self._glu(gate_TF, up_TF)
        return h_TF, lambda y_TD: self.down_proj.adapt(span, h_TF, y_TD, context)

    def _glu(self, gate_TF: Tensor, up_TF: Tensor) -> Tensor:
        return ACTIVATIONS[self.act](gate_TF) * up_TF


class MixLora(nn.Module):
    """One adapter's router and experts in one feed-forward. Untargeted projections hold None.

    In training there is a dropout mask for each h_k, and one per token on the input of A1 and A3,
    shared by its experts; or, with `dropout_masks` independent, one for each A of each expert.
    """

    def __init__(
        self,
        ffn: FeedForward,
        router: Router,
        *,
        projections: tuple[str, ...],
        act_fn: str | None = None,
        dropout_masks: str = "shared",
        **lora,
    ) -> None:
        super().__init__()
        self.num_experts, self.act = router.num_experts, act_fn or ffn.act
        self.dropout_masks = dropout_masks
        self.moe_gate = router
        self.scaling, self.dropout = 1.0, 0.0
        self.gate_proj = self.up_proj = self.down_proj = None
        for name in projections:
            experts = Experts(getattr(ffn, name), router.num_experts, **lora)
            setattr(self, name, experts)
            self.scaling, self.dropout = experts.scaling, experts.dropout

    def forward(
        self,
        ffn: FeedForward,
        x_TD: Tensor,
        gate_TF: Tensor,
        up_TF: Tensor,
        routing: Routing,
        sequences: Sequences,
    ) -> tuple[Tensor, Finish]:
        """(h_NF, finish): y = finish(W2 h + b2). gate and up are W1 x + b1 and W3 x + b3."""
        plan = moe_sort(routing.expert_TK, self.num_experts)
        a_gate_TKR, a_up_TKR = self._shrink(x_TD, plan, sequences)
        is_routed = self.down_proj is not None and self.down_proj.lora_magnitude_vector is not None
        path = self._routed if is_routed else self._shared
        inputs = gate_TF, up_TF, a_gate_TKR, a_up_TKR
        h_NF, finish = path(ffn, *inputs, plan, routing.weight_TK, sequences)
        return h_NF, lambda y_ND: self._with_skipped(finish(y_ND), x_TD, routing.skip_T, sequences)

    def _shrink(self, x_TD: Tensor, plan: Plan, sequences: Sequences) -> list[Tensor | None]:
        """A1 x and A3 x, for the experts of each token."""
        p = self.dropout if self.training else 0.0
        pairs = self.gate_proj, self.up_proj
        lora_as = [pair and pair.lora_A.to(x_TD.dtype) for pair in pairs]
        if self.dropout_masks == "shared" or not p:
            return of_dropped(shrink_all, p, sequences, x_TD, plan, *lora_as)
        rows, x_ND = rows_as_tokens(plan), moe_gather(x_TD, plan)
        row_TK = plan.slot_row_TK.clamp_min(0).long()
        return [
            a if a is None else of_dropped(grouped_shrink, p, sequences, x_ND, a, rows)[row_TK, 0]
            for a in lora_as
        ]

    def _hidden(
        self, ffn, gate_TF, up_TF, a_gate_TKR, a_up_TKR, plan, weight_TK, sequences
    ) -> tuple[Tensor, Tensor | None]:
        """sum_k g_k h_k [T, F], and A2 h_k [T, K, R]."""
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        p = self.dropout if self.training else 0.0
        seed = seed_tensor(sequences.seed(), gate_TF.device) if p else None
        return shared_glu(
            *(gate_TF, up_TF, a_gate_TKR, a_up_TKR),
            *(gate and gate.lora_B, up and up.lora_B, down and down.lora_A),
            *(plan, weight_TK, self.scaling, self.act, p, seed),
            scale_gate_EF=gate and gate.dora_scale(ffn.gate_proj),
            scale_up_EF=up and up.dora_scale(ffn.up_proj),
            bias_gate_F=ffn.gate_proj.bias,
            bias_up_F=ffn.up_proj.bias,
        )

    def _shared(
        self, ffn, gate_TF, up_TF, a_gate_TKR, a_up_TKR, plan, weight_TK, sequences
    ) -> tuple[Tensor, Finish]:
        """W2 once per token, on sum_k g_k h_k."""
        inputs = gate_TF, up_TF, a_gate_TKR, a_up_TKR
        hbar_TF, z_TKR = self._hidden(ffn, *inputs, plan, weight_TK, sequences)
        delta_TD = None
        if self.down_proj is not None:
            scaled_TKR = z_TKR * (self.scaling * weight_TK[..., None])
            delta_TD = self.down_proj.expand(scaled_TKR.to(hbar_TF.dtype), plan)

        def finish(y_TD: Tensor) -> Tensor:
            if delta_TD is not None:
                y_TD.add_(delta_TD)
            if ffn.down_proj.bias is None:
                return y_TD
            extra_T1 = weight_TK.sum(-1, keepdim=True) - 1  # b2 enters as (sum_k g_k) b2
            return y_TD.add_(extra_T1.to(y_TD.dtype) * ffn.down_proj.bias)

        return hbar_TF, finish

    def _routed(
        self, ffn, gate_TF, up_TF, a_gate_TKR, a_up_TKR, plan, weight_TK, sequences
    ) -> tuple[Tensor, Finish]:
        """W2 on each h_k: a row of an expert is a token with one slot."""
        rows = rows_as_tokens(plan)
        gate_NF, up_NF = moe_gather(gate_TF, plan), moe_gather(up_TF, plan)
        slot_N = plan.row_slot_N.clamp_min(0).long()
        a_N1R = [
            None if a is None else a.flatten(0, 1).index_select(0, slot_N)[:, None]
            for a in (a_gate_TKR, a_up_TKR)
        ]
        ones_N1 = weight_TK.new_ones(rows.expert_TK.shape)
        h_NF, z_N1R = self._hidden(ffn, gate_NF, up_NF, *a_N1R, rows, ones_N1, sequences)
        delta_ND = self.down_proj.expand((self.scaling * z_N1R).to(h_NF.dtype), rows)

        def finish(y_ND: Tensor) -> Tensor:
            scale_ED = self.down_proj.dora_scale(ffn.down_proj)
            scale_ND = scale_ED.index_select(0, rows.expert_TK[:, 0].clamp_min(0).long())
            return moe_scatter(rescale(y_ND, delta_ND, scale_ND, ffn.down_proj), plan, weight_TK)

        return h_NF, finish

    def _with_skipped(
        self, y_TD: Tensor, x_TD: Tensor, skip_T: Tensor | None, sequences: Sequences
    ) -> Tensor:
        if skip_T is not None:
            y_TD = y_TD + skip_T[:, None].to(x_TD.dtype) * x_TD
        p = getattr(self.moe_gate, "ffn_dropout", 0.0) if self.training else 0.0
        return dropout(y_TD, p, seed_tensor(sequences.seed(), y_TD.device)) if p else y_TD


def joined(
    plain: tuple[Tensor, Finish], parts: list[tuple[Tensor, Finish]], members: list[Tensor]
) -> tuple[Tensor, Finish]:
    """Of tokens that partly belong to stacks of mixtures: all enter W2 as `plain` has them and as
    each mixture has them, and take what is theirs of its output."""
    hidden, finishes = zip(plain, *parts, strict=True)

    def finish(y_ND: Tensor) -> Tensor:
        y_TD, *others = y_ND.split([len(h) for h in hidden])
        y_TD = finishes[0](y_TD)
        for finish_part, y_part, member_T in zip(finishes[1:], others, members, strict=True):
            y_TD = torch.where(member_T[:, None] >= 0, finish_part(y_part), y_TD)
        return y_TD

    return torch.cat(hidden), finish


def shrink_all(x_TD: Tensor, plan: Plan, *lora_as: Tensor | None) -> list[Tensor | None]:
    return [None if a is None else grouped_shrink(x_TD, a, plan) for a in lora_as]


def rows_as_tokens(plan: Plan) -> Plan:
    """The plan of the routed rows themselves: each a token of one expert, or of none."""
    expert_N = plan.expert_TK.flatten().index_select(0, plan.row_slot_N.clamp_min(0).long())
    expert_N = torch.where(plan.row_slot_N < 0, -1, expert_N)
    return moe_sort(expert_N[:, None], len(plan.expert_start_E1) - 1)


class Experts(LoraPair):
    """One projection's LoRA pairs of all experts, stacked: each is always in the graph."""

    def expand(self, z_TKR: Tensor, plan: Plan) -> Tensor:
        return grouped_expand(z_TKR, self.lora_B.to(z_TKR.dtype), plan)
