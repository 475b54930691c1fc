"""What perplexity hides, measured on a trained model beside it: each extra is one name and one function.

beyond   loss at contexts longer than those of training (beyond.py)
repeats  what a repeated n-gram's second occurrence costs less than its first (repeats.py)
recall   passkeys, copies and, on corpora of questions, answers found again in the context (recall.py)
latents  how much of MLA's latents is used, and what rotation contributes to its scores (latents.py)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from harness.evaluation.beyond import beyond_rows, measure_beyond
from harness.evaluation.latents import latents_rows, measure_latents
from harness.evaluation.perplexity import TokenSplit
from harness.evaluation.recall import measure_recall, recall_rows
from harness.evaluation.repeats import measure_repeats, repeats_rows
from modeling.gpt import GPT


@dataclass(frozen=True)
class Subject:
    """What an extra may look at. An extra's module imports this name for its annotations only (TYPE_CHECKING)."""

    model: GPT  # in evaluation mode, on `device`
    longer: Callable[[int], GPT | None]  # the same weights with that max_seq_len; None: the positions do not allow it
    split: TokenSplit
    end_of_text: int
    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    dataset: str  # name of the corpus being evaluated
    precision: torch.dtype
    device: torch.device
    batch_size: int  # windows of the model's max_seq_len per forward pass
    max_tokens: int  # that an extra looks at, at most


# None: does not apply to this model, or not to this text; WHY_NOT says why.
EXTRAS: dict[str, Callable[[Subject], dict[str, Any] | None]] = {
    "beyond": measure_beyond,
    "repeats": measure_repeats,
    "recall": measure_recall,
    "latents": measure_latents,
}

# What a person reads of an extra's figures: a few rows of name and value.
ROWS: dict[str, Callable[[dict[str, Any]], list[tuple[str, str]]]] = {
    "beyond": beyond_rows,
    "repeats": repeats_rows,
    "recall": recall_rows,
    "latents": latents_rows,
}

WHY_NOT: dict[str, str] = {
    "beyond": "learned positions end at the training length, or the text is too short for twice that length",
    "repeats": "nothing repeats in this text",
    "recall": "the text or the window is too short for a prompt",
    "latents": "no latents in this variant",
}


@torch.no_grad()
def measure_extras(subject: Subject, names: Iterable[str]) -> dict[str, Any]:
    """The chosen extras by name, in the order in which they were named; None where one does not apply."""
    return {name: EXTRAS[name](subject) for name in names}


def extras_rows(extras: Mapping[str, dict[str, Any] | None]) -> list[tuple[str, str]]:
    """The rows of every extra, or why there are none."""
    rows = []
    for name, figures in extras.items():
        rows += [(name, f"not measured: {WHY_NOT[name]}")] if figures is None else ROWS[name](figures)
    return rows
