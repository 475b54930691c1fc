"""What is measured of a model: each figure is declared once, and all that shows, compares or stores it asks here.

A figure is a field of a record's type, and how people see it the note of that field (Shown): tables, CSV, dashboards and the
line of JSON derive from the types. A Metric is one by which models are judged, among them the arms of a study. Which direction
is better is said here and nowhere else: verdicts, the best arm, the Pareto front, colours and the words beside every axis ask
here. No torch: whoever only reads records need not wait for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypedDict, TypeVar, get_type_hints

from harness.files.untrusted import Count, Figure, Positive


@dataclass(frozen=True)
class Shown:
    """A figure that is shown wherever figures of runs are."""

    unit: str  # over a column, and of a difference between two, such as "bits per byte"
    digits: int = 0  # decimals of a figure without an error bar

    def text(self, value: float | None) -> str:
        """A figure without an error bar; nothing for one that is not known."""
        return "" if value is None else f"{value:,.{self.digits}f}"


@dataclass(frozen=True)
class Metric(Shown):
    """A figure of an evaluation that has a better direction."""

    higher_is_better: bool = False
    name: str = ""  # in a study's YAML, in study.json and behind test_ in report.csv
    path: tuple[str, ...] = ()  # keys in the evaluation's record, from the outside in

    @property
    def label(self) -> str:
        """Over a column and in titles."""
        return f"test {self.unit}"

    @property
    def axis(self) -> str:
        """Beside an axis, with the direction that is better."""
        return f"{self.label}, {'higher' if self.higher_is_better else 'lower'} is better"

    @property
    def extreme(self) -> str:
        """What the best figure is among others."""
        return "highest" if self.higher_is_better else "lowest"

    @property
    def probe(self) -> str | None:
        """The extra that measures it (harness/evaluation/probes); None: every evaluation has it."""
        return self.path[1] if self.path[0] == "extras" else None

    def of(self, record: Mapping[str, Any] | None) -> float | None:
        """The figure in an evaluation's record; None where there is none, as of an extra that was not measured."""
        found: Any = record
        for key in self.path:
            found = found.get(key) if isinstance(found, Mapping) else None
        return float(found) if isinstance(found, (int, float)) and not isinstance(found, bool) else None

    def better(self, difference: float) -> bool:
        """Whether a - b of that size speaks for a."""
        return difference > 0 if self.higher_is_better else difference < 0

    def cost(self, value: float) -> float:
        """The figure turned so that smaller is better, for sorting and for the Pareto front."""
        return -value if self.higher_is_better else value


class Scores(TypedDict, total=False):
    """What a split's text is predicted with. Each is worked out by harness/evaluation/perplexity.py: SplitResult."""

    loss: Annotated[Figure, Metric("nats per token", 4)]
    perplexity: Annotated[Figure, Metric("perplexity", 3)]
    word_perplexity: float | None  # up to 1e304 in records of older versions
    bits_per_byte: Annotated[Figure, Metric("bits per byte", 4)]


class ModelRecord(TypedDict, total=False):
    parameters: Annotated[Positive, Shown("parameters")]
    parameters_by_block: dict[str, Count]
    training_flops_per_token: Count


class CacheRecord(TypedDict, total=False):
    """A cache's size, as it stands in a run's and an evaluation's record."""

    cache_context: Positive | None
    cache_bytes_per_token: Annotated[Count, Shown("cache bytes/token")]
    cache_bytes_at_context: Count | None
    cache_bytes_by_context: dict[str, Count] | None  # whose tokens stand there as text
    cache_elements_per_token_per_layer: Figure | None


class Facts(ModelRecord, CacheRecord, total=False):
    """Sizes as they stand in summary.json, and under the same names in a dashboard's configuration and summary."""

    cache_dtype: str
    cache_ratio_to_mha: Annotated[Figure | None, Shown("x MHA", 3)]
    mha_cache_bytes_per_token: Figure | None


_Kind = TypeVar("_Kind", bound=Shown)


def declared(record: type, kind: type[_Kind]) -> dict[str, _Kind]:
    """The figures of a record's type that are declared as `kind`, in the order of its fields."""
    hints = get_type_hints(record, include_extras=True)
    notes = {key: getattr(hint, "__metadata__", ()) for key, hint in hints.items()}
    return {key: note for key, of_field in notes.items() for note in of_field if isinstance(note, kind)}


SCORES = {key: dataclasses.replace(score, name=key, path=(key,)) for key, score in declared(Scores, Metric).items()}
METRICS: dict[str, Metric] = SCORES | {
    metric.name: metric
    for metric in (
        # On the last tokens of n-grams that stood in the context before (harness/evaluation/probes/repeats.py).
        Metric("nats saved by repetition", 3, True, "repeats_gain", ("extras", "repeats", "gain")),
        # Of dataset=mqar and dataset=passkey, whose test text asks questions (harness/evaluation/probes/recall.py).
        Metric("answer accuracy", 4, True, "answer_accuracy", ("extras", "recall", "answers", "accuracy")),
    )
}
LOSS, BITS_PER_BYTE, PERPLEXITY = METRICS["loss"], METRICS["bits_per_byte"], METRICS["perplexity"]
