"""The routers of mixtures, by the name `routing_strategy` gives them, and their losses. All fp32.

A router's constructor names the adapter settings it reads, with their defaults; `choose` turns
logits into a Routing. A new one is a class here with a line in ROUTERS.
"""

import abc
import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import pad_sequence

from mixlora.layers.context import Sequences
from mixlora.ops import linear
from mixlora.ops.philox import seeded
from mixlora.ops.topk_router import Routing, routing_sums, topk_router


class Router(nn.Module, abc.ABC):
    """logits = W x. Subclasses choose experts from them."""

    kind = "MIXLORA"  # which mixtures it routes, under their peft_type
    router_loss = True  # whether the load-balance loss is on unless the settings say otherwise
    router_loss_scope = "global"
    router_aux_loss_coef = 0.001
    router_z_loss_coef = 0.0

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        router_init_range: float = 0.02,
        jitter_noise: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_experts, self.jitter_noise = num_experts, jitter_noise
        self.weight = nn.Parameter(torch.empty(num_experts, in_features))
        self.init_weight(router_init_range)

    def init_weight(self, router_init_range: float) -> None:
        nn.init.normal_(self.weight, std=router_init_range)

    def logits(self, x_TD: Tensor, sequences: Sequences) -> Tensor:
        wide = torch.promote_types(self.weight.dtype, torch.float32)  # also in a model cast to bf16
        if self.training and self.jitter_noise:  # on a copy: the experts see x itself
            low, high = 1 - self.jitter_noise, 1 + self.jitter_noise
            generator = seeded(sequences.seed(), x_TD.device)
            noise_TD = torch.empty_like(x_TD, dtype=wide).uniform_(low, high, generator=generator)
            x_TD = x_TD * noise_TD
        if not torch.is_grad_enabled():  # an autograd function takes its time even so
            return linear(x_TD.to(wide), self.weight.to(wide))
        return _WideProduct.apply(x_TD, self.weight, wide)

    def forward(self, x_TD: Tensor, sequences: Sequences) -> Routing:
        return self.choose(self.logits(x_TD, sequences), sequences)

    @abc.abstractmethod
    def choose(self, logits_TE: Tensor, sequences: Sequences) -> Routing:
        """Experts and weights of every token, and the sums of the losses (`routing_sums`)."""


class _WideProduct(torch.autograd.Function):
    """x W^T in `wide`. What is kept for backward is x as it is: its copy is made again."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ED: Tensor, wide: torch.dtype) -> Tensor:
        ctx.save_for_backward(x_TD, weight_ED)
        ctx.wide = wide
        return linear(x_TD.to(wide), weight_ED.to(wide))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlogits_TE: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight_ED = ctx.saved_tensors
        dx_TD = dweight_ED = None
        if ctx.needs_input_grad[0]:
            dx_TD = (dlogits_TE @ weight_ED.to(ctx.wide)).to(x_TD.dtype)
        if ctx.needs_input_grad[1]:
            dweight_ED = (dlogits_TE.T @ x_TD.to(ctx.wide)).to(weight_ED.dtype)
        return dx_TD, dweight_ED, None


class TopKRouter(Router):
    """The K most probable experts, renormalised (MixLoRA, arXiv 2404.15159, eq. 7, Algorithm 1)."""

    def __init__(
        self,
        in_features: int,
        num_experts: int = 8,
        top_k: int = 2,
        router_init_range: float = 0.02,
        jitter_noise: float = 0.0,
    ) -> None:
        super().__init__(in_features, num_experts, router_init_range, jitter_noise)
        self.top_k = top_k

    def choose(self, logits_TE: Tensor, sequences: Sequences) -> Routing:
        return topk_router(logits_TE, self.top_k, sequences.mask_T, sequences.chosen_TK)


class TopPRouter(Router):
    """The most probable experts up to the first that takes their sum past top_p ("dynamic").

    Weights are the probabilities, not renormalised. A temperature > 0 divides the probabilities
    (not the logits), as in the published code. K = E, with empty slots.
    """

    def __init__(
        self,
        in_features: int,
        num_experts: int = 8,
        top_p: float = 0.8,
        temperature: float = 0.0,
        router_init_range: float = 0.02,
        jitter_noise: float = 0.0,
    ) -> None:
        super().__init__(in_features, num_experts, router_init_range, jitter_noise)
        self.top_p, self.temperature = top_p, temperature

    def choose(self, logits_TE: Tensor, sequences: Sequences) -> Routing:
        prob_TE = logits_TE.softmax(-1)
        tempered_TE = prob_TE / self.temperature if self.temperature else prob_TE
        expert_TK = sequences.chosen_TK
        if expert_TK is None:
            sorted_TE, order_TE = tempered_TE.detach().sort(dim=-1, descending=True, stable=True)
            # cumsum on a GPU is not deterministic
            sums_TE = torch.stack([*itertools.accumulate(sorted_TE.unbind(1))], 1)
            reached_TE = sums_TE > self.top_p
            kept_TE = torch.ones_like(reached_TE)
            kept_TE[:, 1:] = ~reached_TE[:, :-1]  # the first that reaches it is kept
            is_kept_TE = torch.zeros_like(kept_TE).scatter(1, order_TE, kept_TE)
            expert_E = torch.arange(self.num_experts, dtype=torch.int32, device=logits_TE.device)
            expert_TK = expert_E.where(is_kept_TE, -1)
        weight_TK = tempered_TE.where(expert_TK >= 0, 0)
        sums = routing_sums(logits_TE, prob_TE, expert_TK, sequences.mask_T)
        return Routing(expert_TK, weight_TK, *sums)


class SwitchRouter(Router):
    """The most probable expert, as long as it has room (Switch, arXiv 2101.03961): y = p FFN_e(x).

    An expert takes the first `expert_capacity` tokens of a sequence that choose it; of a later one
    y = p x, as in the published code. The same in training and in inference: the cache counts on.
    `ffn_dropout` is a dropout on y.
    """

    router_z_loss_coef = 0.001

    def __init__(
        self,
        in_features: int,
        num_experts: int = 8,
        expert_capacity: int = 32,
        ffn_dropout: float = 0.0,
        router_init_range: float = 1.0,
        jitter_noise: float = 0.01,
    ) -> None:
        super().__init__(in_features, num_experts, router_init_range, jitter_noise)
        self.expert_capacity, self.ffn_dropout = expert_capacity, ffn_dropout

    def choose(self, logits_TE: Tensor, sequences: Sequences) -> Routing:
        prob_TE = logits_TE.softmax(-1)
        expert_T1 = prob_TE.detach().argmax(-1, keepdim=True)
        kept_T1 = sequences.chosen_TK
        if kept_T1 is None:
            place_TE = sequences.places(F.one_hot(expert_T1[:, 0], self.num_experts))
            has_room_T1 = place_TE.gather(1, expert_T1) <= self.expert_capacity
            kept_T1 = expert_T1.where(has_room_T1, -1).int()
        prob_T1 = prob_TE.gather(1, expert_T1)
        weight_T1 = prob_T1.where(kept_T1 >= 0, 0)
        sums = routing_sums(logits_TE, prob_TE, expert_T1, sequences.mask_T)  # dropped ones too
        skip_T = (prob_T1 - weight_T1)[:, 0]
        dropped_T = kept_T1[:, 0] < 0
        if sequences.mask_T is not None:
            dropped_T = dropped_T & sequences.mask_T
        return Routing(kept_T1, weight_T1, *sums, skip_T, dropped_T.sum())


class PluggedRouter(Router):
    """Of the LoRA experts of one projection, not of a feed-forward."""

    router_loss = False

    def init_weight(self, router_init_range: float) -> None:
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(router_init_range))


class DenseRouter(PluggedRouter):
    """All experts, weighted by their probabilities (LoRAMoE, arXiv 2312.09979).

    The localized balancing loss of the paper is not in the published code, nor here.
    """

    kind = "LORAMOE"

    def __init__(
        self, in_features: int, num_experts: int = 8, router_init_range: float = 5.0
    ) -> None:
        super().__init__(in_features, num_experts, router_init_range)

    def choose(self, logits_TE: Tensor, sequences: Sequences) -> Routing:
        prob_TE = logits_TE.softmax(-1)
        expert_E = torch.arange(self.num_experts, dtype=torch.int32, device=logits_TE.device)
        expert_TK = expert_E.expand_as(prob_TE)
        sums = routing_sums(logits_TE, prob_TE, expert_TK, sequences.mask_T)
        return Routing(expert_TK, prob_TE, *sums)


class MolaRouter(PluggedRouter, TopKRouter):
    """Top-K as MixLoRA's, for every projection its own (MoLA, arXiv 2402.08562)."""

    kind = "MOLA"

    def __init__(
        self,
        in_features: int,
        num_experts: int = 8,
        top_k: int = 2,
        router_init_range: float = 5.0,
    ) -> None:
        TopKRouter.__init__(self, in_features, num_experts, top_k, router_init_range)


ROUTERS: dict[str, type[Router]] = {
    "mixlora": TopKRouter,
    "mixlora-dynamic": TopPRouter,
    "mixlora-switch": SwitchRouter,
    "loramoe": DenseRouter,
    "mola": MolaRouter,
}


def joined(parts: Sequence[Routing]) -> Routing:
    """The routing of a layer's tokens whose rows are not adjacent."""
    if len(parts) == 1:
        return parts[0]
    columns = zip(*parts, strict=True)
    tokens = ("expert_TK", "weight_TK", "skip_T")
    return Routing(
        *(
            None
            if column[0] is None
            else torch.cat(column)
            if name in tokens
            else torch.stack(column).sum(0)
            for name, column in zip(Routing._fields, columns, strict=True)
        )
    )


def load_balance_loss(
    layers: Sequence[Routing], scope: Literal["global", "per_layer"] = "global"
) -> Tensor:
    """E sum_e f_e P_e, f and P being the shares of selections and of probability of expert e.

    f counts all K choices of a token, so that balanced routing gives K (as Mixtral's loss in
    `transformers`; the paper's eq. 8 counts the first and gives 1). "global" takes the shares
    over all layers together, as the published code does; "per_layer" averages the layers' losses.
    """
    # layers may differ in their experts (MiLoRA's do in its targets): those it lacks count 0
    count_LE = pad_sequence([routing.count_E for routing in layers], batch_first=True)
    prob_LE = pad_sequence([routing.prob_E for routing in layers], batch_first=True)
    num_experts_L = torch.tensor([len(routing.count_E) for routing in layers]).to(prob_LE)
    num_tokens_L1 = torch.stack([routing.num_tokens for routing in layers])[:, None]
    if scope == "global":
        count_LE, prob_LE = count_LE.sum(0, keepdim=True), prob_LE.sum(0, keepdim=True)
        num_tokens_L1, num_experts_L = num_tokens_L1.sum(0, keepdim=True), num_experts_L[:1]
    num_tokens_L1 = num_tokens_L1.clamp_min(1)
    loss_L = (count_LE / num_tokens_L1 * (prob_LE / num_tokens_L1)).sum(-1) * num_experts_L
    return loss_L.mean()


def z_loss(layers: Sequence[Routing]) -> Tensor:
    """Mean of logsumexp(logits)^2 over tokens and layers (ST-MoE, arXiv 2202.08906, eq. 5)."""
    num_tokens = torch.stack([routing.num_tokens for routing in layers]).sum()
    return torch.stack([routing.z for routing in layers]).sum() / num_tokens.clamp_min(1)
