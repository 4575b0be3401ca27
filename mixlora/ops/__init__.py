"""The operators. Each file here holds one: its maths, the public function, the reference."""

import torch  # noqa: F401  its libraries must be loaded before the extension that links to them

try:
    import mixlora._C  # noqa: F401  registers torch.ops.mixlora
except ImportError as error:
    raise ImportError(f"mixlora._C cannot be loaded, run `make kernels` ({error})") from None

from mixlora.ops._switch import reference, use_reference
from mixlora.ops.dropout import dropout, dropout_ref
from mixlora.ops.few_rows_linear import few_rows_linear, few_rows_linear_ref
from mixlora.ops.few_rows_lora import few_rows_lora, few_rows_lora_ref
from mixlora.ops.grouped_lora import grouped_lora, grouped_lora_ref
from mixlora.ops.grouped_shrink import (
    grouped_expand,
    grouped_expand_ref,
    grouped_shrink,
    grouped_shrink_ref,
)
from mixlora.ops.linear import is_few, linear, linear_ref
from mixlora.ops.moe_gather import moe_gather, moe_gather_ref
from mixlora.ops.moe_scatter import moe_scatter, moe_scatter_ref
from mixlora.ops.moe_sort import Plan, moe_sort, moe_sort_ref
from mixlora.ops.shared_glu import ACTIVATIONS, shared_glu, shared_glu_ref
from mixlora.ops.topk_router import Routing, topk_router, topk_router_ref

__all__ = [
    "ACTIVATIONS",
    "Plan",
    "Routing",
    "dropout",
    "dropout_ref",
    "few_rows_linear",
    "few_rows_linear_ref",
    "few_rows_lora",
    "few_rows_lora_ref",
    "grouped_expand",
    "grouped_expand_ref",
    "grouped_lora",
    "grouped_lora_ref",
    "grouped_shrink",
    "grouped_shrink_ref",
    "is_few",
    "linear",
    "linear_ref",
    "moe_gather",
    "moe_gather_ref",
    "moe_scatter",
    "moe_scatter_ref",
    "moe_sort",
    "moe_sort_ref",
    "reference",
    "shared_glu",
    "shared_glu_ref",
    "topk_router",
    "topk_router_ref",
    "use_reference",
]
