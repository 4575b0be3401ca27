"""What every model family shares: adapters held by name, one of them active."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mixlora.errors import InputError, did_you_mean
from mixlora.layers.context import (
    ForwardContext,
    Member,
    Span,
    before_labels,
    check_spans,
    spans_of,
    stacked_rows,
)
from mixlora.layers.kv_cache import KvCache
from mixlora.layers.router import joined, load_balance_loss, z_loss
from mixlora.ops import Routing


class AdaptedModel(nn.Module):
    """Base class of the models; `mixlora.add_adapter` fills in what it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.adapter_configs: dict[str, Any] = {}  # name -> mixlora.AdapterConfig
        self.active_adapter: str | None = None  # None = the base model
        self.stack_sizes: dict[str, int] = {}  # of the stacks around it, by name
        self.name_or_path: str | None = None  # what the base was loaded as: a folder or a hub id
        self.folder: Path | None = None  # where its files are
        self.gradient_checkpointing = False  # one checkpoint per block, in training
        self.recompute_ffn = False  # one per feed-forward
        self.is_sharded = False  # a block's weights are gathered from all processes as it computes
        self.follows = False  # it computes along with others (mixlora/processes.py)
        self.generators: dict[str, torch.Generator] = {}  # whence an adapter's dropout, by name
        self._context = ForwardContext(())

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy: what it holds, without the last forward's graph."""
        return {**super().__getstate__(), "_context": ForwardContext(())}

    def begin(
        self,
        tokens_BS: Tensor,
        adapters: Sequence[str | Member | None] | Sequence[Span] | None,
        cache: KvCache | None = None,
        *,
        mask_BS: Tensor | None = None,
        segments_BS: Tensor | None = None,
        prompt_BS: Tensor | None = None,
        labels_BS: Tensor | None = None,
        **others_BS: Tensor | None,
    ) -> ForwardContext:
        """Check a forward's inputs and make its context.

        `adapters` names each row's or tells its place in a stack, or is their spans; None = the
        active one for all. `prompt_BS` None: the tokens before the first label, without labels all;
        behind a prompt that the cache holds none.
        """
        if tokens_BS.dim() != 2 or tokens_BS.dtype not in (torch.int64, torch.int32):
            got = f"{tokens_BS.dtype} {list(tokens_BS.shape)}"
            raise InputError(f"tokens must be integers [B, S], got {got}")
        B, S = tokens_BS.shape
        tensors = {"mask_BS": mask_BS, "segments_BS": segments_BS, "prompt_BS": prompt_BS}
        tensors |= {"labels_BS": labels_BS, **others_BS}
        for name, x_BS in tensors.items():
            if x_BS is not None and x_BS.shape != (B, S):
                raise InputError(f"{name} must be [B, S] = [{B}, {S}], got {list(x_BS.shape)}")
            is_bool = name in ("mask_BS", "prompt_BS", "select_BS")
            if x_BS is not None and is_bool and x_BS.dtype != torch.bool:
                raise InputError(f"{name} must be bool, got {x_BS.dtype}")
        if cache is not None and segments_BS is not None:
            raise InputError("segments_BS needs cache=None: packed rows are not continued")
        if adapters is None:
            spans = (Span(self.active_adapter, 0, B),)
        elif len(adapters) and isinstance(adapters[0], Span):
            spans = check_spans(adapters, B, S)
        elif isinstance(adapters, str) or len(adapters) != B:
            got = repr(adapters) if isinstance(adapters, str) else len(adapters)
            raise InputError(f"adapters must be {B} names, one for each row, got {got}")
        else:
            spans = spans_of(adapters)
        for name in {span.name for span in spans} - {None, *self.adapter_configs}:
            hint = did_you_mean(name, self.adapter_configs)
            raise InputError(f"the model has no adapter named {name!r}{hint}")
        continues_B = torch.zeros(B, dtype=torch.bool)
        if cache is not None:
            continues_B = cache.seen_B[cache.selected] > 0
        if prompt_BS is None and labels_BS is not None:
            prompt_BS = before_labels(labels_BS, segments_BS)
        elif prompt_BS is None:
            prompt_BS = (~continues_B).to(tokens_BS.device)[:, None].expand(B, S)
        else:
            for span in spans:
                config = self.adapter_configs.get(span.name)
                rows = slice(span.start, span.end)
                if config and config.routes_prompts and continues_B[rows].any():
                    if prompt_BS[rows].any():
                        raise InputError(
                            f"prompt_BS: the cache holds {cache.length} tokens already, but MiLoRA "
                            "routes by the whole prompt: prefill it in one forward"
                        )
        self._context = ForwardContext(
            *(spans, mask_BS, segments_BS, cache),
            recompute_ffn=self.recompute_ffn and self.training,
            generators=self.generators,
            stacked=stacked_rows(spans, adapters or (), self.stack_sizes, tokens_BS),
            prompt_BS=prompt_BS if mask_BS is None else prompt_BS & mask_BS,
            continues_B=continues_B.tolist(),
        )
        return self._context

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within it no dropout and no gradients; afterwards the mode is as before."""
        training = self.training
        if training:
            self.eval()
        try:
            # what is gathered in inference mode could not be written again outside of it
            with torch.no_grad() if self.is_sharded else torch.inference_mode():
                yield
        finally:
            if training:
                self.train()

    def routing(self, name: str) -> list[Routing]:
        """The last forward's routing of one adapter, layer by layer; empty without a router."""
        layers: dict[Any, list[Routing]] = {}
        for (span, layer), routing in self._context.routing.items():
            if span.name == name:
                layers.setdefault(layer, []).append(routing)
        return [joined(parts) for parts in layers.values()]

    def router_loss(self, name: str | None = None) -> Tensor:
        """Auxiliary loss of the last forward, coefficients included (fp32 scalar).

        None sums over the adapters of that forward; 0 where there is no router.
        """
        if name is not None and name not in self.adapter_configs:
            hint = did_you_mean(name, self.adapter_configs)
            raise InputError(f"the model has no adapter named {name!r}{hint}")
        routed = {span.name for span, _ in self._context.routing} & self.adapter_configs.keys()
        loss = torch.zeros((), device=next(self.parameters()).device)
        for owner in [name] if name else sorted(routed):
            config, layers = self.adapter_configs[owner], self.routing(owner)
            if layers and config.router_loss:
                balance = load_balance_loss(layers, config.router_loss_scope)
                loss = loss + config.router_aux_loss_coef * balance
                if config.router_z_loss_coef:
                    loss = loss + config.router_z_loss_coef * z_loss(layers)
        return loss
