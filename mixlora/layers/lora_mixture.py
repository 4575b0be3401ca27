"""Mixtures of LoRA experts around single projections: LoRAMoE (arXiv 2312.09979) and MoLA
(arXiv 2402.08562).

    y = W x + b + sum_e g_e s B_e A_e x,   g by the projection's own router, 0 where not chosen
      = W x + b + s [B_1 .. B_E] (g_e A_e x)

The second line is two products of rank E R, whatever the routing.
"""

from torch import Tensor

from mixlora.layers.context import ForwardContext, Span
from mixlora.layers.lora import Linear, LoraPair, of_dropped
from mixlora.layers.router import Router
from mixlora.ops import linear


class LoraMixture(LoraPair):
    def __init__(self, base: Linear, router: Router, **lora) -> None:
        super().__init__(base, router.num_experts, **lora)
        self.moe_gate = router

    def forward(
        self, x_BSI: Tensor, y_BSO: Tensor, base: Linear, context: ForwardContext, span: Span
    ) -> Tensor:
        x_TI = x_BSI.reshape(-1, x_BSI.shape[-1])
        sequences = context.sequences(span, self)
        routing = self.moe_gate(x_TI, sequences)
        context.routing.setdefault((span, self), routing)
        weight_TE = routing.weight_TK.new_zeros(len(x_TI), len(self.lora_A))
        weight_TE = weight_TE.scatter(1, routing.expert_TK.long(), routing.weight_TK)
        p = self.dropout if self.training else 0.0
        lora_a_NI = self.lora_A.to(x_TI.dtype).flatten(0, 1)
        a_TER = of_dropped(linear, p, sequences, x_TI, lora_a_NI)
        a_TER = a_TER.unflatten(1, self.lora_A.shape[:2])
        a_TER = a_TER * (self.scaling * weight_TE[..., None]).to(x_TI.dtype)
        b_OER = self.lora_B.to(x_TI.dtype).transpose(0, 1)
        return y_BSO.add_(linear(a_TER.flatten(1), b_OER.flatten(1)).view_as(y_BSO))
