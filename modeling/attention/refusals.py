"""What more than one mechanism refuses: Refusals with the number, or the word, and what to choose instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modeling.refusal import Refusal


def check_choice(field: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise Refusal(f"{field}={value} is unknown here; choose {', '.join(choices[:-1])} or {choices[-1]}")


def check_heads(n_heads: int, n_kv_heads: int) -> None:
    """Query heads share key/value heads in groups of one size."""
    if n_kv_heads < 1 or n_heads % n_kv_heads:
        possible = [groups for groups in range(1, n_heads + 1) if n_heads % groups == 0]
        raise Refusal(f"n_kv_heads={n_kv_heads} does not divide n_heads={n_heads}; choose one of {possible}")


def check_reach(window: int | None, causal: bool) -> None:
    """Of the newest tokens that a query sees: its own at least, and none behind it."""
    if window is not None and window < 1:
        raise Refusal(f"window={window} sees nothing; choose 1 or more, or null for the whole context")
    if window is not None and not causal:
        raise Refusal(f"window={window} looks back alone, and causal=False looks ahead too: leave one of the two out")


def check_query_rank(q_lora_rank: int | None, d_model: int, width: int) -> None:
    """A latent of queries is no wider than what it joins: d_model and the queries of all heads."""
    if q_lora_rank is not None and not 1 <= q_lora_rank <= min(d_model, width):
        raise Refusal(
            f"q_lora_rank={q_lora_rank} compresses nothing: queries go from {d_model} to {width} dimensions; "
            f"choose at most {min(d_model, width)}, or null for none"
        )


def check_alike(what: str, mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """A layer reads what it would have made itself."""
    for option, value in mine.items():
        if value != theirs.get(option):
            raise Refusal(f"a layer of {option}={value} cannot read {what} of {option}={theirs.get(option)}: make them alike")
