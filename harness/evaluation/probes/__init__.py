"""What perplexity hides, measured on a trained model beside it. harness.config.schema.EXTRAS names the probes.

A probe is a measurement and how a person reads it, of one run and in a study's report. To add one: a file here that bears its
name and holds a PROBE, and the name in that list.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from harness.config.schema import EXTRAS
from harness.data.prepared import VerifiedSplit
from harness.evaluation.evaluate import CacheChoice
from harness.evaluation.losses import TokenLosses
from modeling.gpt import GPT

Figures = dict[str, Any]  # what a probe measured, as it stands in an evaluation's record: JSON's types alone
Rows = list[tuple[str, str]]  # name and value


@dataclass(frozen=True)
class Subject:
    """What a probe may look at."""

    losses: TokenLosses  # of a model in evaluation mode
    longer: Callable[[int], GPT | None]  # the same weights with that max_seq_len; None: the positions do not allow it
    split: VerifiedSplit
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
    """One probe."""

    measure: Callable[[Subject], Figures | None]  # None: does not apply to this model, or not to this text
    rows: Callable[[Figures], Rows]
    why_not: str  # said where `measure` gives None
    title: str  # of the table in a study's report
    words: Mapping[str, str] = field(default_factory=dict)  # what its figures are called there, else by their own names
    compared: Callable[[Figures], Figures] = lambda figures: figures  # of which the plain numbers stand in that table
    through_cache: bool = True  # `measure` does as `Subject.through` says


FLOOR = "at its floor in full precision: says nothing"


def at_floor(share: float, chance: float, count: int) -> bool:
    """Whether a share of `count` answers is within two standard deviations of what guessing gives, or below."""
    return share <= chance + 2 * math.sqrt(chance * (1 - chance) / count)


def said_of_floor(entry: Mapping[str, Any]) -> str:
    """To be added to a row; nothing where records are older than the field."""
    return f"; {FLOOR}" if entry.get("at_floor") else ""


def probe(name: str) -> Probe:
    """The probe of this name, one of harness.config.schema.EXTRAS: no other module can be named."""
    assert name in EXTRAS, f"{name} is no probe"
    found = importlib.import_module(f"{__name__}.{name}").PROBE
    assert isinstance(found, Probe)
    return found


@torch.no_grad()
def measure_extras(subject: Subject, names: Iterable[str]) -> dict[str, Figures | None]:
    """The figures of the named probes, in that order; None where one does not apply.

    Through a cache those that cannot be are left out.
    """
    chosen = {name: probe(name) for name in names}
    return {name: each.measure(subject) for name, each in chosen.items() if subject.through is None or each.through_cache}


def with_floors(figures: Any, full: Any) -> Any:
    """Figures through a cache with every at_floor that full precision has: a cache cannot lose what was not there."""
    if isinstance(figures, Mapping) and isinstance(full, Mapping):
        floor = {"at_floor": full["at_floor"]} if "at_floor" in full else {}
        return {name: with_floors(figure, full.get(name)) for name, figure in figures.items()} | floor
    if isinstance(figures, list) and isinstance(full, list):
        return [with_floors(*both) for both in zip(figures, full, strict=True)]
    return figures


def extras_rows(extras: Mapping[str, Figures | None], without: Mapping[str, Figures | None] | None = None) -> Rows:
    """The rows of every probe, or why there are none; each followed by that of the same without a cache where that is given."""
    rows: Rows = []
    for name, figures in extras.items():
        full = (without or {}).get(name)
        if figures is None:
            rows.append((name, f"not measured: {probe(name).why_not}"))
        elif full is None:
            rows += probe(name).rows(figures)
        else:
            for through, plain in zip(probe(name).rows(figures), probe(name).rows(full), strict=True):
                rows += [through, ("  without it", plain[1])]
    return rows
