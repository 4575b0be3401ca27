"""Adapters of one shape side by side, for inference: a batch whose rows belong to any of them costs
as many calls as a batch of one.

A stack stands in a layer like an adapter, under a name of its own; `ForwardContext.stacked` tells
which tokens belong to which member. Ranks are padded with zeros, a member's scale s is part of its
B, and all is in the dtype that the kernels read. Of a member's place that is not taken all is zero.

    LoRA, DoRA    y += B_m A_m x, m = the token's member: the grouped operators, m as the expert
    MiLoRA        the same, for tokens whose prompt chose the projection: others have no expert
    MixLoRA       expert e of member m is expert m E + e of one large mixture
"""

import copy

import torch
from torch import Tensor, nn

from mixlora.layers.context import ForwardContext, Sequences, Span
from mixlora.layers.lora import Linear, LoraPair, dora_change, rescale
from mixlora.layers.milora import MiLora, decisions
from mixlora.layers.mixlora_ffn import PROJECTIONS, Experts, FeedForward, MixLora
from mixlora.layers.router import Router
from mixlora.ops import Routing, grouped_expand, grouped_shrink, moe_sort


class StackedPair(nn.Module):
    """A and B of `size` members' E pairs each: [size E, R, I] and [size E, O, R]."""

    def __init__(
        self, pair: LoraPair, size: int, rank: int, dtypes: tuple[torch.dtype, ...]
    ) -> None:
        super().__init__()
        I, O = pair.lora_A.shape[-1], pair.lora_B.shape[-2]
        E = len(pair.lora_A) if pair.lora_A.dim() == 3 else 1
        device = pair.lora_A.device

        def zeros(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros(size * E, *shape, dtype=dtype, device=device)

        self.num_pairs = E
        self.register_buffer("lora_A", zeros(dtypes[0], rank, I), persistent=False)
        self.register_buffer("lora_B", zeros(dtypes[1], O, rank), persistent=False)
        self.lora_magnitude_vector = None
        if pair.lora_magnitude_vector is not None:
            del self.lora_magnitude_vector
            dtype = pair.lora_magnitude_vector.dtype
            scale = torch.ones(size * E + 1, O, dtype=dtype, device=device)  # last: of no member
            self.register_buffer("lora_magnitude_vector", scale, persistent=False)

    def put(self, index: int, pair: LoraPair, base: Linear) -> None:
        E, r = self.num_pairs, pair.lora_A.shape[-2]
        mine = slice(index * E, (index + 1) * E)
        self.clear(index)
        self.lora_A[mine, :r] = pair.lora_A
        self.lora_B[mine, :, :r] = pair.scaling * pair.lora_B
        if self.lora_magnitude_vector is not None:
            self.lora_magnitude_vector[mine] = pair.dora_scale(base)

    def clear(self, index: int) -> None:
        mine = slice(index * self.num_pairs, (index + 1) * self.num_pairs)
        self.lora_A[mine], self.lora_B[mine] = 0, 0

    def dora_scale(self, base: Linear) -> Tensor | None:
        """[size E, O]"""
        return None if self.lora_magnitude_vector is None else self.lora_magnitude_vector[:-1]


class LoraStack(StackedPair):
    def __init__(self, name: str, pair: LoraPair, base: Linear, size: int, rank: int) -> None:
        dtype = base.weight.dtype
        super().__init__(pair, size, rank, (dtype, dtype))
        self.name = name

    def forward(
        self, x_BSI: Tensor, y_BSO: Tensor, base: Linear, context: ForwardContext, span: Span
    ) -> Tensor:
        rows = context.stacked[span, self.name]
        a_T1R = grouped_shrink(x_BSI.reshape(-1, x_BSI.shape[-1]), self.lora_A, rows.plan)
        delta_BSO = grouped_expand(a_T1R, self.lora_B, rows.plan).view_as(y_BSO)
        if self.lora_magnitude_vector is None:
            return y_BSO.add_(delta_BSO)
        scale_TO = self.lora_magnitude_vector[rows.member_T.long()]
        return rescale(y_BSO, delta_BSO, scale_TO.view_as(y_BSO), base)


class MiLoraStack(LoraStack):
    """Behind the prompt: what it chose is in the cache."""

    def __init__(self, name: str, pair: MiLora, base: Linear, size: int, rank: int) -> None:
        super().__init__(name, pair, base, size, rank)
        self.size, self.layer, self.module = size, pair.layer, pair.module

    def forward(
        self, x_BSI: Tensor, y_BSO: Tensor, base: Linear, context: ForwardContext, span: Span
    ) -> Tensor:
        rows = context.stacked[span, self.name]
        weight_B = span.rows(decisions(context.cache, self.layer))[:, self.module]
        num_new = len(rows.member_T) // len(weight_B)
        weight_T = weight_B.to(x_BSI.dtype).repeat_interleave(num_new)
        member_T = rows.member_T.where(weight_T != 0, -1)
        plan = moe_sort(member_T[:, None], self.size)
        x_TI, y_TO = x_BSI.flatten(0, -2), y_BSO.flatten(0, -2)
        a_T1R = grouped_shrink(x_TI, self.lora_A, plan)
        if self.lora_magnitude_vector is None:
            delta_TO = grouped_expand(a_T1R * weight_T[:, None, None], self.lora_B, plan)
        else:
            delta_TO = grouped_expand(a_T1R, self.lora_B, plan)
            scale_TO = self.lora_magnitude_vector[member_T.long()]
            delta_TO = weight_T[:, None] * dora_change(y_TO, delta_TO, scale_TO, base)
        return y_BSO.add_(delta_TO.view_as(y_BSO))


class StackedExperts(StackedPair):
    expand = Experts.expand


class MixLoraStack(MixLora):
    def __init__(self, name: str, mixture: MixLora, ffn: FeedForward, size: int, rank: int) -> None:
        nn.Module.__init__(self)
        self.num_experts, self.act = size * mixture.num_experts, mixture.act
        self.dropout_masks, self.scaling, self.dropout = "shared", 1.0, 0.0
        self.moe_gate = StackedRouter(name, mixture.moe_gate, size)
        dtype = ffn.gate_proj.weight.dtype
        wide = torch.promote_types(dtype, torch.float32)  # what shared_glu reads
        for projection in PROJECTIONS:
            pair = getattr(mixture, projection)
            dtypes = (wide, dtype) if projection == "down_proj" else (dtype, wide)
            stacked = None if pair is None else StackedExperts(pair, size, rank, dtypes)
            setattr(self, projection, stacked)

    def put(self, index: int, mixture: MixLora, ffn: FeedForward) -> None:
        self.moe_gate.weight[index] = mixture.moe_gate.weight
        for projection in PROJECTIONS:
            if getattr(self, projection) is not None:
                pair, base = getattr(mixture, projection), getattr(ffn, projection)
                getattr(self, projection).put(index, pair, base)

    def clear(self, index: int) -> None:
        for projection in PROJECTIONS:
            if getattr(self, projection) is not None:
                getattr(self, projection).clear(index)


class StackedRouter(nn.Module):
    """The members' routers, which differ in their weights alone [size, E, D]."""

    def __init__(self, name: str, router: Router, size: int) -> None:
        super().__init__()
        self.name, self.num_experts = name, router.num_experts
        wide = torch.promote_types(router.weight.dtype, torch.float32)
        weight = router.weight.detach().new_zeros(size, *router.weight.shape, dtype=wide)
        self.register_buffer("weight", weight, persistent=False)
        self.rule = copy.copy(router)  # chooses; its weight is not asked for
        self.rule._parameters = {}
        self.rule.eval()

    def forward(self, x_TD: Tensor, sequences: Sequences) -> Routing:
        rows = sequences.context.stacked[sequences.span, self.name]
        logits_TE = grouped_shrink(x_TD.to(self.weight.dtype), self.weight, rows.plan)[:, 0]
        routing = self.rule.choose(logits_TE, sequences)
        expert_TK, is_member_T1 = routing.expert_TK, rows.member_T[:, None] >= 0
        is_used_TK = is_member_T1 & (expert_TK >= 0)
        expert_TK = (expert_TK + self.num_experts * rows.member_T[:, None]).where(is_used_TK, -1)
        weight_TK = routing.weight_TK.where(is_used_TK, 0)
        skip_T = routing.skip_T
        if skip_T is not None:
            skip_T = skip_T.where(is_member_T1[:, 0], 0)
        return routing._replace(expert_TK=expert_TK.int(), weight_TK=weight_TK, skip_T=skip_T)
