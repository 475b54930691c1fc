"""The attention of some layers without the model around them: what the contract checks and a benchmark of attention runs.

Letters: B batch, T new tokens, D d_model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modeling.attention import EXECUTION, set_execution, shares_latents
from modeling.attention.cache import Cache, new_cache


class AttentionLayers(nn.Module):
    """No norms, MLPs or head: each layer reads x_BTD, the outputs are summed, and what layers share is handed on.

    It offers what decoding asks of a GPT, with activations in place of tokens.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    @property
    def attentions(self) -> list[Any]:
        """The layers, in order."""
        return list(self.layers)

    def set_execution(self, **changes: str) -> None:
        """As GPT's."""
        for attention in self.attentions:
            set_execution(attention, **({key: getattr(attention, key) for key in EXECUTION} | changes))

    def new_cache(
        self,
        batch_size: int,
        max_seq_len: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        static: bool = False,
        window: int | None = None,
        sinks: int = 0,
    ) -> list[Cache]:
        """As GPT's."""
        return [
            new_cache(layer, batch_size, max_seq_len, dtype=dtype, device=device, static=static, window=window, sinks=sinks)
            for layer in self.attentions
        ]

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
        shared: list[Tensor] = []
        for index, layer in enumerate(self.layers):
            more: dict[str, Any] = {"shared": shared} if shares_latents(layer) else {}
            if weights_out is not None:
                more["weights_out"] = weights_out
            layer_BTD = layer(x_BTD, None if cache is None else cache[index], valid_BT=valid_BT, **more)
            out_BTD = layer_BTD if out_BTD is None else out_BTD + layer_BTD
        assert out_BTD is not None, "there are no layers"
        return out_BTD
