"""What the arms of a study are compared by: each metric is one entry of METRICS, and all that depends on it asks there.

A figure of a run is read from the record of its evaluation on the test split. Which direction is better is said here and
nowhere else: verdicts, the best arm, the Pareto front, colours and the words beside every axis follow it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Metric:
    """One figure of an evaluation."""

    name: str  # in a study's YAML, in study.json and behind test_ in report.csv
    unit: str  # of a figure and of a difference between two, such as "bits per byte"
    higher_is_better: bool
    digits: int  # decimals of a figure without an error bar
    path: tuple[str, ...]  # keys in the evaluation's record, from the outside in

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

    def text(self, value: float) -> str:
        """A figure without an error bar."""
        return f"{value:.{self.digits}f}"

    def better(self, difference: float) -> bool:
        """Whether a - b of that size speaks for a."""
        return difference > 0 if self.higher_is_better else difference < 0

    def cost(self, value: float) -> float:
        """The figure turned so that smaller is better, for sorting and for the Pareto front."""
        return -value if self.higher_is_better else value


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("loss", "nats per token", False, 4, ("loss",)),
        Metric("perplexity", "perplexity", False, 2, ("perplexity",)),
        Metric("bits_per_byte", "bits per byte", False, 4, ("bits_per_byte",)),
        # On the last tokens of n-grams that stood in the context before (harness/evaluation/probes/repeats.py).
        Metric("repeats_gain", "nats saved by repetition", True, 3, ("extras", "repeats", "gain")),
        # Of dataset=mqar and dataset=passkey, whose test text asks questions (harness/evaluation/probes/recall.py).
        Metric("answer_accuracy", "answer accuracy", True, 4, ("extras", "recall", "answers", "accuracy")),
    )
}
LOSS, BITS_PER_BYTE, PERPLEXITY = METRICS["loss"], METRICS["bits_per_byte"], METRICS["perplexity"]
