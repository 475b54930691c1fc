"""The attention of several layers: what they offer together, in a model or without one around them.

Letters: B batch, T new tokens, D d_model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modeling.attention import execute, hands_on, reads_back
from modeling.attention.cache import Cache, one_call
from modeling.attention.layer_cache import check_values, new_cache
from modeling.attention.quantisation import CacheFormat


class HasAttentions(nn.Module):
    """A module with an attention in each of its layers."""

    @property
    def attentions(self) -> list[Any]:
        """The attention module of each layer, in order."""
        raise NotImplementedError

    def set_execution(self, **changes: str) -> None:
        """Choose how attention is computed in every layer: backend, decode, kernel; what is not named stays.

        Where layers differ, a path is for those that have it (modeling/attention/__init__.py, execute). Raises Refusal
        for one that none has.
        """
        execute(self.attentions, **changes)

    def new_cache(
        self,
        batch_size: int,
        max_seq_len: int,
        *,
        dtype: torch.dtype | CacheFormat,
        device: torch.device | str,
        static: bool = False,
        window: int | None = None,
        sinks: int = 0,
    ) -> list[Cache]:
        """One empty cache per layer (modeling/attention/cache.py); that of a layer reading another's is empty.

        Raises Refusal for a format that the variant cannot keep.
        """
        check_values(self.attentions, dtype)
        options: dict[str, Any] = {"dtype": dtype, "device": device, "static": static, "window": window, "sinks": sinks}
        caches: list[Cache] = []
        for attention in self.attentions:
            back = reads_back(attention)
            caches.append(new_cache(attention, batch_size, max_seq_len, reads=caches[-back] if back else None, **options))
        return caches


class AttentionLayers(HasAttentions):
    """What the contract checks and a benchmark of attention runs.

    No norms, MLPs or head: each layer reads x_BTD, the outputs are summed, and what layers share is handed on.

    It offers what decoding asks of a GPT, with activations in place of tokens.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    @property
    def attentions(self) -> list[Any]:
        return list(self.layers)

    def forward(
        self,
        x_BTD: Tensor,
        cache: Sequence[Cache] | None = None,
        *,
        valid_BT: Tensor | None = None,
        weights_out: list[Tensor] | None = None,
    ) -> Tensor:
        """x_BTD -> x_BTD. weights_out receives those of every layer."""
        out_BTD: Tensor | None = None
        shared: list[list[Tensor]] = [[] for _ in self.layers]  # of each layer that others read
        with one_call(cache):
            for index, layer in enumerate(self.layers):
                more: dict[str, Any] = {"shared": shared[index - reads_back(layer)]} if hands_on(layer) else {}
                if weights_out is not None:
                    more["weights_out"] = weights_out
                layer_BTD = layer(x_BTD, None if cache is None else cache[index], valid_BT=valid_BT, **more)
                out_BTD = layer_BTD if out_BTD is None else out_BTD + layer_BTD
        assert out_BTD is not None, "there are no layers"
        return out_BTD
