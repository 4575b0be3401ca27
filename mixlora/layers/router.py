"""The router of a mixture and its load-balance loss. All of it is fp32."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from mixlora.ops import Routing, topk_router


class Router(nn.Module):
    """Top-K over experts for every token (MixLoRA, arXiv 2404.15159, eq. 7 and Algorithm 1)."""

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        top_k: int,
        router_init_range: float = 0.02,
        jitter_noise: float = 0.0,
    ) -> None:
        super().__init__()
        self.top_k, self.jitter_noise = top_k, jitter_noise
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        nn.init.normal_(self.weight, std=router_init_range)

    def forward(self, x_TD: Tensor, mask_T: Tensor | None, expert_TK: Tensor | None) -> Routing:
        """`expert_TK`: the experts chosen before, where a block is computed again in backward."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)  # also in a model cast to bf16
        x_TD = x_TD.to(wide)
        if self.training and self.jitter_noise:
            low, high = 1 - self.jitter_noise, 1 + self.jitter_noise
            x_TD = x_TD * torch.empty_like(x_TD).uniform_(low, high)
        return topk_router(x_TD @ self.weight.to(wide).T, self.top_k, mask_T, expert_TK)


def joined(parts: Sequence[Routing]) -> Routing:
    """The routing of a layer's tokens whose rows are not adjacent."""
    if len(parts) == 1:
        return parts[0]
    experts, weights, *sums = zip(*parts, strict=True)
    return Routing(torch.cat(experts), torch.cat(weights), *(torch.stack(x).sum(0) for x in sums))


def load_balance_loss(
    layers: Sequence[Routing], scope: Literal["global", "per_layer"] = "global"
) -> Tensor:
    """E sum_e f_e P_e, f and P being the shares of selections and of probability of expert e.

    f counts all K choices of a token, so that balanced routing gives K (as Mixtral's loss in
    `transformers`; the paper's eq. 8 counts the first and gives 1). "global" takes the shares
    over all layers together, as the published code does; "per_layer" averages the layers' losses.
    """
    count_LE = torch.stack([routing.count_E for routing in layers])
    prob_LE = torch.stack([routing.prob_E for routing in layers])
    num_tokens_L1 = torch.stack([routing.num_tokens for routing in layers])[:, None]
    if scope == "global":
        count_LE, prob_LE = count_LE.sum(0, keepdim=True), prob_LE.sum(0, keepdim=True)
        num_tokens_L1 = num_tokens_L1.sum(0, keepdim=True)
    num_tokens_L1 = num_tokens_L1.clamp_min(1)
    loss_L = (count_LE / num_tokens_L1 * (prob_LE / num_tokens_L1)).sum(-1) * count_LE.shape[1]
    return loss_L.mean()
