"""What a probe is: a measurement of a trained model beside its perplexity, and how a person reads it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from harness.evaluation.evaluate import CacheChoice
from harness.evaluation.losses import TokenLosses
from harness.evaluation.perplexity import TokenSplit
from modeling.gpt import GPT

Figures = dict[str, Any]  # what a probe measured, as it stands in an evaluation's record: JSON's types alone
Rows = list[tuple[str, str]]  # name and value


@dataclass(frozen=True)
class Subject:
    """What a probe may look at."""

    losses: TokenLosses  # of a model in evaluation mode
    longer: Callable[[int], GPT | None]  # the same weights with that max_seq_len; None: the positions do not allow it
    split: TokenSplit
    end_of_text: int
    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    dataset: str  # name of the corpus being evaluated
    batch_size: int  # windows of the model's max_seq_len per forward pass
    max_tokens: int  # that a probe looks at, at most
    through: CacheChoice | None = None  # the kind of cache that everything is decoded through

    @property
    def model(self) -> GPT:
        return self.losses.model

    @property
    def device(self) -> torch.device:
        return self.losses.device

    @property
    def precision(self) -> torch.dtype:
        return self.losses.precision


@dataclass(frozen=True)
class Probe:
    """One probe: the file that bears its name holds it as PROBE."""

    measure: Callable[[Subject], Figures | None]  # None: does not apply to this model, or not to this text
    rows: Callable[[Figures], Rows]
    why_not: str  # said where `measure` gives None
    through_cache: bool = True  # `measure` does as `Subject.through` says


FLOOR = "at its floor in full precision: says nothing"


def at_floor(share: float, chance: float, count: int) -> bool:
    """Whether a share of `count` answers is within two standard deviations of what guessing gives, or below."""
    return share <= chance + 2 * math.sqrt(chance * (1 - chance) / count)


def said_of_floor(entry: Mapping[str, Any]) -> str:
    """To be added to a row; nothing where records are older than the field."""
    return f"; {FLOOR}" if entry.get("at_floor") else ""
