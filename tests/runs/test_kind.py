"""How an evaluation was scored is one list: whatever tells records, files and dashboards apart covers it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from harness.report.comparison import CONDITIONS
from harness.runs.evaluate_run import record_name
from harness.runs.kind import Kind, kind_of
from harness.runs.records import Evaluation
from harness.runs.to_dashboard import dashboard_figures

FIELDS = [field.name for field in dataclasses.fields(Kind)]
RUN = {"data_fingerprint": "d" * 16, "precision": "float32", "cache_dtype": "bfloat16"}
PLAIN: dict[str, Any] = {
    "dataset": "books",
    "split": "test",
    **RUN,
    "per_document": False,
    "stride_fraction": 0.5,
    "max_tokens": None,
    "through_cache": False,
    "cache_window": None,
    "cache_sinks": 0,
    "loss": 3.0,
}
THROUGH = PLAIN | {"through_cache": True, "cache_window": 64, "cache_sinks": 4, "cache_dtype": "int8"}
# Of each field a value beside that of one of the two.
OTHERS: dict[str, tuple[dict[str, Any], Any]] = {
    "per_document": (PLAIN, True),
    "stride_fraction": (PLAIN, 0.25),
    "max_tokens": (PLAIN, 8000),
    "cache_dtype": (PLAIN, "float32"),
    "through_cache": (THROUGH, False),
    "cache_window": (THROUGH, 32),
    "cache_sinks": (THROUGH, 2),
}


def test_the_names_of_files_on_disk_stay() -> None:
    assert record_name(PLAIN) == "books-test-84b55b15"  # type: ignore[arg-type]
    assert record_name(THROUGH) == "books-test-6a25a897"  # type: ignore[arg-type]


@pytest.mark.parametrize("field", FIELDS)
def test_each_field_tells_files_and_dashboard_keys_apart(field: str) -> None:
    before, value = OTHERS[field]
    other = before | {field: value}
    assert kind_of(other) == dataclasses.replace(kind_of(before), **{field: value})
    assert record_name(other) != record_name(before)  # type: ignore[arg-type]
    assert dashboard_figures(other, RUN).keys().isdisjoint(dashboard_figures(before, RUN))


def test_records_hold_each_field_and_comparisons_part_what_differs_in_it() -> None:
    assert set(FIELDS) <= Evaluation.__annotations__.keys()
    assert set(FIELDS) - {"max_tokens"} <= CONDITIONS.keys()  # for which the tokens that were scored stand


def test_older_records_were_scored_plainly_and_a_limit_not_reached_is_none() -> None:
    assert kind_of({"loss": 3.0}) == Kind(False, None, None, None, False, None, 0)
    assert kind_of({"max_tokens": 8000, "evaluated_tokens": 500}).max_tokens is None
    assert kind_of({"max_tokens": 8000, "evaluated_tokens": 8000}).max_tokens == 8000
