"""MiLoRA (Zhang et al., arXiv 2410.18035): the prompt chooses which of a layer's LoRAs act.

    h = pool(H)                         H: the prompt's hidden states before the layer
    p = softmax(W_r g(h))               over the E targeted projections of the layer, fp32
    y = W x + b + g_e s B_e A_e x       of projection e, for all tokens of the sequence

g_e is 0 but for the top_k largest p_e; for those it is p_e (`router_weight` probability), or 1 with
p_e's gradient (straight_through). With DoRA: y = W x + b + g_e (dora_e(x) - W x - b).
The decision is made once, at the prompt: the KV cache keeps it for all tokens to come. A projection
that is active for no row of a span computes nothing but W x + b.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixlora.errors import InputError
from mixlora.layers.context import ForwardContext, Sequences, Span
from mixlora.layers.kv_cache import KvCache
from mixlora.layers.lora import Linear, LoraPair, dora_change, of_dropped
from mixlora.layers.router import ROUTERS, Router
from mixlora.ops import Routing, linear
from mixlora.ops.topk_router import routing_sums

# Of GELU: within 0.004 on [-3, 3], near it on [-12, 12], monotone beyond (least squares).
NUMERATOR = (-0.003155, 0.5007, 0.46131, 0.15775, 0.024848, 0.0018217, 5.0345e-05)
DENOMINATOR = (0.089464, 0.24326, 0.0202, 0.001388, 8.6049e-05)


def rational(x: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor:
    """sum_j a_j x^j / (1 + |sum_i b_i x^i|), j from 0, i from 1, has no poles (eq. 6)."""
    return polynomial(x, numerator) / (1 + (x * polynomial(x, denominator)).abs())


def polynomial(x: Tensor, coefficients: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    for c in reversed(coefficients.unbind()):
        y = y * x + c
    return y


def attention_weights(x_BSD: Tensor, prompts_BQS: Tensor, query: Tensor) -> Tensor:
    """Softmax over the prompt of one learned query's products (the paper's eq. 8)."""
    score_B1S = (x_BSD @ query)[:, None]
    lowest = torch.finfo(score_B1S.dtype).min
    return score_B1S.masked_fill(~prompts_BQS, lowest).softmax(-1) * prompts_BQS


def mean_weights(x_BSD: Tensor, prompts_BQS: Tensor, query: None) -> Tensor:
    return prompts_BQS / prompts_BQS.sum(-1, keepdim=True, dtype=x_BSD.dtype).clamp_min(1)


def last_weights(x_BSD: Tensor, prompts_BQS: Tensor, query: None) -> Tensor:
    place_BQS = prompts_BQS.cumsum(-1)
    return (prompts_BQS & (place_BQS == place_BQS[..., -1:])).to(x_BSD.dtype)


def weighted(weights: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x_BSD, prompts_BQS, query: weights(x_BSD, prompts_BQS, query) @ x_BSD


def largest(x_BSD: Tensor, prompts_BQS: Tensor, query: None) -> Tensor:
    pooled = []
    for prompt_BS in prompts_BQS.unbind(1):  # one after the other: only packed rows have several
        masked_BSD = x_BSD.masked_fill(~prompt_BS[..., None], -torch.inf)
        largest_BD = F.pad(masked_BSD, (0, 0, 0, 1), value=-torch.inf).amax(1)
        pooled.append(largest_BD.masked_fill(~prompt_BS.any(-1, keepdim=True), 0))
    return torch.stack(pooled, 1)


# (hidden states, the prompts' tokens [B, Q, S], query) -> [B, Q, D], 0 for a prompt of no tokens
POOLERS: dict[str, Callable[..., Tensor]] = {
    "attention": weighted(attention_weights),
    "last": weighted(last_weights),
    "mean": weighted(mean_weights),
    "max": largest,
}
MODULES = 7  # at most, of a layer
ROUTER_ACTS = ("rational", "gelu", "relu")
ROUTER_WEIGHTS = ("probability", "straight_through")


class PromptRouter(Router):
    """Which of a layer's modules act for a sequence; an expert of its Routing is a module, a token
    of it is a prompt. count_E counts the most probable one (eq. 4), so that a balanced load-balance
    loss is 1 whatever top_k."""

    kind = "MILORA"
    router_loss_scope = "per_layer"
    router_aux_loss_coef = 0.01

    def __init__(
        self,
        in_features: int,
        num_modules: int,
        top_k: int = 3,
        router_weight: str = "probability",
        route_prompt: bool = True,
        pooler: str = "attention",
        router_act: str = "rational",
        router_init_range: float = 0.02,
    ) -> None:
        super().__init__(in_features, num_modules, router_init_range)
        self.top_k, self.router_weight, self.route_prompt = top_k, router_weight, route_prompt
        self.pooler, self.router_act = pooler, router_act
        self.query = self.numerator = self.denominator = None
        if pooler == "attention":
            self.query = nn.Parameter(torch.zeros(in_features))  # begins as the mean
        if router_act == "rational":
            self.numerator = nn.Parameter(torch.tensor(NUMERATOR))
            self.denominator = nn.Parameter(torch.tensor(DENOMINATOR))

    def forward(self, x_TD: Tensor, sequences: Sequences) -> Routing:
        pooled_TD = self.activated(self.pooled(x_TD, sequences.prompts_BQS))
        return self.choose(self.logits(pooled_TD, sequences), sequences)

    def choose(self, logits_TE: Tensor, sequences: Sequences) -> Routing:
        prob_TE = logits_TE.softmax(-1)
        order_TE = prob_TE.detach().sort(dim=-1, descending=True, stable=True).indices
        expert_TK = sequences.chosen_TK
        if expert_TK is None:
            expert_TK = order_TE[:, : self.top_k].sort(dim=-1).values.int()
        weight_TK = prob_TE.gather(1, expert_TK.long())
        if self.router_weight == "straight_through":
            weight_TK = 1 + (weight_TK - weight_TK.detach())
        real_T = sequences.prompts_BQS.any(-1).flatten()
        return Routing(
            expert_TK, weight_TK, *routing_sums(logits_TE, prob_TE, order_TE[:, :1], real_T)
        )

    def pooled(self, x_TD: Tensor, prompts_BQS: Tensor) -> Tensor:
        B, _, S = prompts_BQS.shape
        x_TD = x_TD.to(torch.promote_types(self.weight.dtype, torch.float32))
        x_BSD = x_TD.view(B, S, x_TD.shape[1])
        query = None if self.query is None else self.query.to(x_TD.dtype)
        return POOLERS[self.pooler](x_BSD, prompts_BQS, query).flatten(0, 1)

    def activated(self, x_TD: Tensor) -> Tensor:
        if self.router_act == "rational":
            return rational(x_TD, self.numerator.to(x_TD.dtype), self.denominator.to(x_TD.dtype))
        return F.gelu(x_TD) if self.router_act == "gelu" else F.relu(x_TD)


ROUTERS["milora"] = PromptRouter


def key_of(layer: int) -> tuple[str, int]:
    """Of what the cache keeps of its rows' prompts: the modules' weights [B, MODULES]."""
    return "milora", layer


def decisions(cache: KvCache, layer: int) -> Tensor:
    return cache.state(key_of(layer))


class Gate(NamedTuple):
    """What a module does in a span: its weight for the tokens it is active for."""

    index_N: Tensor | None  # among the span's tokens; None = all
    weight_N1: Tensor


def gates(weight_TE: Tensor) -> list[Gate | None]:
    """By module; None for one that no token uses, which then computes nothing."""
    T, E = weight_TE.shape
    weight_ET, end = weight_TE.T, 0
    module_N, index_N = weight_ET.detach().nonzero(as_tuple=True)
    weight_N1 = weight_ET[module_N, index_N][:, None]
    found: list[Gate | None] = []
    for count in module_N.bincount(minlength=E).tolist():
        start, end = end, end + count
        index = None if count == T else index_N[start:end]
        found.append(Gate(index, weight_N1[start:end]) if count else None)
    return found


class PromptRouting(nn.Module):
    """The prompt routers of a block by adapter name. Called before the block, it leaves in the
    context what its MiLora modules are to do."""

    def __init__(self, hidden_size: int, layer: int) -> None:
        super().__init__()
        self.hidden_size, self.layer = hidden_size, layer
        self.adapters = nn.ModuleDict()

    def forward(self, x_BSD: Tensor, context: ForwardContext) -> None:
        for span in context.spans:
            if span.name in self.adapters:
                step = self.continued if context.continues(span) else self.begun
                context.gates[span, self.layer] = step(span, span.rows(x_BSD), context)

    def begun(self, span: Span, x_BSD: Tensor, context: ForwardContext) -> list[Gate | None]:
        """By the prompt's decision, which is made here and kept in the cache."""
        router, cache = self.adapters[span.name], context.cache
        sequences = context.sequences(span, self.layer)
        routing = router(x_BSD.flatten(0, 1), sequences)
        context.routing.setdefault((span, self.layer), routing)
        weight_TE = routing.weight_TK.new_zeros(len(routing.weight_TK), router.num_experts)
        weight_TE = weight_TE.scatter(1, routing.expert_TK.long(), routing.weight_TK)
        weight_BQE = weight_TE.view(*sequences.prompts_BQS.shape[:2], router.num_experts)
        if cache is not None:
            state_BE = weight_BQE.new_zeros(cache.num_rows, MODULES)
            if key_of(self.layer) in cache.states:
                state_BE = decisions(cache, self.layer).clone()
            span.rows(state_BE)[:, : router.num_experts] = weight_BQE.detach()[:, 0]
            cache.set_state(key_of(self.layer), state_BE)
        weight_BSE = self.of_tokens(weight_BQE, x_BSD.shape[1], span, context)
        if not router.route_prompt:
            weight_BSE = weight_BSE * ~span.rows(context.prompt_BS)[..., None]
        return gates(weight_BSE.flatten(0, 1))

    def continued(self, span: Span, x_BSD: Tensor, context: ForwardContext) -> list[Gate | None]:
        """By the decision in the cache. Gates are found anew only where it has changed: decoding
        asks at every token."""
        (B, S, _), cache = x_BSD.shape, context.cache
        if key_of(self.layer) not in cache.states:
            raise InputError(
                f"adapter {span.name!r} saw none of the cache's {cache.length - S} tokens: MiLoRA "
                "routes by the whole prompt, in one forward"
            )
        key = self.layer, span, S, str(cache.selected)
        version = cache.states[key_of(self.layer)]._version
        kept_version, kept = cache.memo.get(key, (None, None))
        if kept_version != version:
            num_modules = self.adapters[span.name].num_experts
            weight_BE = span.rows(decisions(cache, self.layer))[:, :num_modules]
            kept = gates(weight_BE[:, None].expand(B, S, -1).flatten(0, 1))
            cache.memo[key] = version, kept
        return kept

    def of_tokens(self, weight_BQE: Tensor, S: int, span: Span, context: ForwardContext) -> Tensor:
        B, _, E = weight_BQE.shape
        if context.segments_BS is None:
            return weight_BQE.expand(B, S, E)
        document_BS1 = span.rows(context.document_BS)[..., None]
        weight_BSE = weight_BQE.gather(1, document_BS1.expand(B, S, E))
        if context.mask_BS is None:
            return weight_BSE
        # padding is a document of its own: for its sake alone no module is to be active
        return weight_BSE * span.rows(context.mask_BS)[..., None]


class MiLora(LoraPair):
    """The update of one projection, for the tokens that its layer's router gives it."""

    def __init__(self, base: Linear, layer: int, module: int, **lora) -> None:
        super().__init__(base, **lora)
        self.layer, self.module = layer, module

    def forward(
        self, x_BSI: Tensor, y_BSO: Tensor, base: Linear, context: ForwardContext, span: Span
    ) -> Tensor:
        gate = context.gates[span, self.layer][self.module]
        if gate is None:
            return y_BSO
        index_N, weight_N1 = gate
        x_NI, y_TO = x_BSI.flatten(0, -2), y_BSO.flatten(0, -2)
        x_NI = x_NI if index_N is None else x_NI.index_select(0, index_N)
        p = self.dropout if self.training else 0.0
        sequences = context.sequences(span, self)
        a_NR = of_dropped(linear, p, sequences, x_NI, self.lora_A.to(x_NI.dtype)) * self.scaling
        scale_O = self.dora_scale(base)
        weight_N1 = weight_N1.to(x_NI.dtype)
        if scale_O is None:
            change_NO = linear(a_NR * weight_N1, self.lora_B.to(x_NI.dtype))
        else:
            y_NO = y_TO if index_N is None else y_TO.index_select(0, index_N)
            delta_NO = linear(a_NR, self.lora_B.to(x_NI.dtype))
            change_NO = weight_N1 * dora_change(y_NO, delta_NO, scale_O, base)
        y_TO = y_TO.add_(change_NO) if index_N is None else y_TO.index_add_(0, index_N, change_NO)
        return y_TO.view_as(y_BSO)
