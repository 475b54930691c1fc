"""A small plan of measuring decode speed, and variants to measure by it."""

from __future__ import annotations

from typing import Any

import torch

from harness.decode.subjects import DecodePlan, DecodeSubject, footprint, paths_of
from modeling.attention.layers import AttentionLayers
from tests.support.variants import attention_from, gpt_from


def plan(**changes: Any) -> DecodePlan:
    settings: dict[str, Any] = {
        "contexts": (16,),
        "batch_sizes": (2,),
        "steps": 3,
        "rounds": 2,
        "device": torch.device("cpu"),
        "dtype": torch.float32,
        "cache_dtype": torch.float32,
        "budget_bytes": 2**28,
        "prefill_tokens": 64,
    }
    return DecodePlan(**(settings | changes))


def subject(attention: str, *, layers: int = 0, decode: str = "both") -> DecodeSubject:
    """The variant at SIZES: the whole model, or so many attention layers."""
    overrides = [f"attention={attention}"]
    part = AttentionLayers([attention_from(overrides) for _ in range(layers)]) if layers else gpt_from(overrides)
    sizes = footprint(part, dtype=torch.float32, cache_dtype=torch.float32)
    return DecodeSubject(attention, part, paths_of(part.attentions[0], decode), sizes)
