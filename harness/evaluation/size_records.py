"""What a record says of a model's sizes. No torch: whoever only reads records need not wait for it."""

from __future__ import annotations

from typing import TypedDict

from harness.files.untrusted import Count, Figure, Positive


class CacheRecord(TypedDict, total=False):
    """As it stands in a run's and an evaluation's record."""

    cache_context: Positive | None
    cache_bytes_per_token: Count
    cache_bytes_at_context: Count | None
    cache_bytes_by_context: dict[str, Count] | None  # whose tokens stand there as text
    cache_elements_per_token_per_layer: Figure | None


class Facts(CacheRecord, total=False):
    """As they stand in summary.json, and under the same names in a dashboard's configuration and summary."""

    parameters: Positive
    parameters_by_block: dict[str, Count]
    training_flops_per_token: Count
    cache_dtype: str
    cache_ratio_to_mha: Figure | None
    mha_cache_bytes_per_token: Figure | None
