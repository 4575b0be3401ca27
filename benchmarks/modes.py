"""MixLoRA's feed-forward as it was published, out of the same kernels, to compare with.

vanilla    every expert runs a whole feed-forward on its rows: W1, W3 and W2 on N = T K rows
paper      W1 and W3 once per token, shared by its experts (arXiv 2404.15159, 3.4); W2 on N rows
"""

from torch import Tensor

from mixlora.layers.context import ForwardContext
from mixlora.layers.mixlora_ffn import FeedForward
from mixlora.ops import ACTIVATIONS, grouped_lora, linear, moe_gather, moe_scatter, moe_sort


class Vanilla(FeedForward):
    shares_gate_and_up = False

    def _forward(self, x_BSD: Tensor, context: ForwardContext) -> Tensor:
        (span,) = context.spans
        x_TD, mixture = x_BSD.flatten(0, 1), self.mixtures[span.name]
        routing = mixture.moe_gate(x_TD, context.sequences(span, self))
        context.routing.setdefault((span, self), routing)
        plan = moe_sort(routing.expert_TK, mixture.num_experts)
        x_ND = moe_gather(x_TD, plan)

        def update(name: str, x_NI: Tensor) -> Tensor:
            lora_a, lora_b = (getattr(mixture, name).lora_A, getattr(mixture, name).lora_B)
            lora_a, lora_b = lora_a.to(x_NI.dtype), lora_b.to(x_NI.dtype)
            return grouped_lora(x_NI, lora_a, lora_b, plan.expert_start_E1, mixture.scaling)

        def entering(name: str) -> Tensor:
            weight = getattr(self, name).weight
            if self.shares_gate_and_up:
                return moe_gather(linear(x_TD, weight), plan) + update(name, x_ND)
            return linear(x_ND, weight) + update(name, x_ND)

        h_NF = ACTIVATIONS[mixture.act](entering("gate_proj")) * entering("up_proj")
        y_ND = linear(h_NF, self.down_proj.weight) + update("down_proj", h_NF)
        return moe_scatter(y_ND, plan, routing.weight_TK).view_as(x_BSD)


class Paper(Vanilla):
    shares_gate_and_up = True


MODES = {"paper": Paper, "vanilla": Vanilla}
