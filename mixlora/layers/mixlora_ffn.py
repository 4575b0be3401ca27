"""MixLoRA (arXiv 2404.15159): LoRA experts around one frozen feed-forward, chosen by a router.

    y = sum_k g_k FFN_ek(x),   FFN_e: W1 (gate), W3 (up), W2 (down), each with a LoRA of expert e
      = W2 (sum_k g_k h_k) + sum_k B2_ek (s g_k A2_ek h_k)

The second line is exact and costs one frozen feed-forward whatever K is: see ops/shared_glu.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixlora.layers.context import ForwardContext, Span
from mixlora.layers.lora import Linear, init_lora_a, lora_scaling
from mixlora.layers.router import Router
from mixlora.ops import ACTIVATIONS, Routing, grouped_shrink, moe_sort, shared_glu

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


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
        hidden, delta = [], []
        for span in context.spans:
            h_BSF, delta_BSD = self._hidden(span, x_BSD, gate_BSF, up_BSF, context)
            hidden.append(h_BSF)
            delta.append(delta_BSD)
        y_BSD = self.down_proj(hidden[0] if len(hidden) == 1 else torch.cat(hidden), context)
        for span, delta_BSD in zip(context.spans, delta, strict=True):
            if delta_BSD is not None:
                span.rows(y_BSD).add_(delta_BSD)
        return y_BSD

    def _hidden(
        self, span: Span, x_BSD: Tensor, gate_BSF: Tensor, up_BSF: Tensor, context: ForwardContext
    ) -> tuple[Tensor, Tensor | None]:
        """What enters W2 for a span's rows, and what is added to W2 of it."""
        x_BSD, gate_BSF, up_BSF = map(span.rows, (x_BSD, gate_BSF, up_BSF))
        if span.name not in self.mixtures:
            return ACTIVATIONS[self.act][0](gate_BSF) * up_BSF, None
        mixture = self.mixtures[span.name]
        x_TD, gate_TF, up_TF = (x.flatten(0, 1) for x in (x_BSD, gate_BSF, up_BSF))
        mask_T = None if context.mask_BS is None else span.rows(context.mask_BS).flatten()
        before = context.routing.get((span, self))
        routing = mixture.moe_gate(x_TD, mask_T, before and before.expert_TK)
        context.routing.setdefault((span, self), routing)
        hbar_TF, delta_TD = mixture(x_TD, gate_TF, up_TF, routing)
        if self.down_proj.bias is not None:  # it enters as (sum_k g_k) b2; down_proj adds b2
            extra_T1 = routing.weight_TK.sum(-1, keepdim=True) - 1
            delta_TD = delta_TD + extra_T1.to(x_TD.dtype) * self.down_proj.bias
        return hbar_TF.view_as(gate_BSF), delta_TD.view_as(x_BSD)


class Experts(nn.Module):
    """One projection's LoRA pairs of all experts, stacked: each is always in the graph."""

    def __init__(self, base: Linear, num_experts: int, r: int, lora_init: str) -> None:
        super().__init__()
        out_features, in_features = base.weight.shape
        self.lora_A = nn.Parameter(init_lora_a(torch.empty(num_experts, r, in_features), lora_init))
        self.lora_B = nn.Parameter(torch.zeros(num_experts, out_features, r))


class MixLora(nn.Module):
    """One adapter's router and experts in one feed-forward. Untargeted projections hold None."""

    def __init__(
        self,
        ffn: FeedForward,
        *,
        projections: tuple[str, ...],
        num_experts: int,
        top_k: int,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        lora_init: str = "original",
        act_fn: str | None = None,
        router_init_range: float = 0.02,
        jitter_noise: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_experts, self.act = num_experts, act_fn or ffn.act
        self.scaling, self.dropout = lora_scaling(r, lora_alpha, use_rslora), lora_dropout
        hidden_size = ffn.gate_proj.weight.shape[1]
        self.moe_gate = Router(
            hidden_size,
            num_experts,
            top_k=top_k,
            router_init_range=router_init_range,
            jitter_noise=jitter_noise,
        )
        for name in PROJECTIONS:
            experts = Experts(getattr(ffn, name), num_experts, r, lora_init)
            setattr(self, name, experts if name in projections else None)

    def forward(
        self, x_TD: Tensor, gate_TF: Tensor, up_TF: Tensor, routing: Routing
    ) -> tuple[Tensor, Tensor]:
        """(hbar_TF, delta_TD): y = W2 hbar + delta. gate and up are W1 x and W3 x.

        In training one dropout mask per token on the input of A1 and A3, shared by its experts,
        and one on each h_k.
        """
        plan = moe_sort(routing.expert_TK, self.num_experts)
        dropout = self.dropout if self.training else 0.0
        seed = torch.randint(2**62, (), device=x_TD.device) if dropout else None
        dropped_TD = F.dropout(x_TD, dropout)
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        a_gate_TKR = gate and grouped_shrink(dropped_TD, gate.lora_A.to(x_TD.dtype), plan)
        a_up_TKR = up and grouped_shrink(dropped_TD, up.lora_A.to(x_TD.dtype), plan)
        hbar_TF, z_TKR = shared_glu(
            *(gate_TF, up_TF, a_gate_TKR, a_up_TKR),
            *(gate and gate.lora_B, up and up.lora_B, down and down.lora_A),
            *(plan, routing.weight_TK, self.scaling, self.act, dropout, seed),
        )
        if down is None:
            return hbar_TF, torch.zeros_like(x_TD)
        scaled_TKR = z_TKR * (self.scaling * routing.weight_TK[..., None])
        return hbar_TF, self._expand(scaled_TKR.to(x_TD.dtype), routing.expert_TK)

    def _expand(self, z_TKR: Tensor, expert_TK: Tensor) -> Tensor:
        """sum_k B2_ek z_k as one product: z in its expert's columns, zero elsewhere."""
        T, K, R = z_TKR.shape
        E = self.num_experts
        column_TKR = torch.where(expert_TK < 0, E, expert_TK.long())[..., None].expand(T, K, R)
        z_TER = z_TKR.new_zeros(T, E + 1, R).scatter(1, column_TKR, z_TKR)[:, :E]
        b_EDR = self.down_proj.lora_B.to(z_TKR.dtype)
        return z_TER.flatten(1) @ b_EDR.transpose(1, 2).flatten(0, 1)
