"""How an evaluation was scored: the one list of what records, comparisons, dashboards and reports tell evaluations apart by."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


def _of_text(default: Any, heading: str | None) -> Any:
    """How the text was scored. default: of records older than the field; heading: how a table says it, {} the value."""
    return dataclasses.field(default=default, metadata={"heading": heading, "of_cache": False})


def _of_cache(default: Any, heading: str) -> Any:
    return dataclasses.field(default=default, metadata={"heading": heading, "of_cache": True})


@dataclass(frozen=True)
class Kind:
    """How a split was scored. Figures of two kinds are figures of two things; precision is a circumstance."""

    per_document: bool = _of_text(False, "per_document={}")
    stride_fraction: float | None = _of_text(None, "stride_fraction={}")  # None: the record is older than this
    # The first tokens of the split only; None: all of it. A table says how many tokens were scored instead.
    max_tokens: int | None = _of_text(None, None)
    cache_dtype: str | None = _of_cache(None, "cache in {}")
    through_cache: bool = _of_cache(False, "through_cache={}")
    cache_window: int | None = _of_cache(None, "window {}")
    cache_sinks: int = _of_cache(0, "{} sinks")

    @property
    def protocol(self) -> tuple[Any, ...]:
        """The same, whatever the cache."""
        return tuple(getattr(self, name) for name in PROTOCOL)

    @property
    def has_usual_stride(self) -> bool:
        return self.stride_fraction in (None, USUAL["stride_fraction"])


_FIELDS = dataclasses.fields(Kind)
PROTOCOL = tuple(field.name for field in _FIELDS if not field.metadata["of_cache"])
CACHE = tuple(field.name for field in _FIELDS if field.metadata["of_cache"])
HEADINGS: dict[str, str] = {field.name: field.metadata["heading"] for field in _FIELDS if field.metadata["heading"]}
# Of an evaluation without a cache, and of records from before there were others; in which dtype its size is quoted they say.
PLAIN_CACHE: dict[str, Any] = {
    field.name: field.default for field in _FIELDS if field.metadata["of_cache"] and field.name != "cache_dtype"
}
# How a split is scored where nothing else is said.
USUAL: dict[str, Any] = {**PLAIN_CACHE, "per_document": False, "stride_fraction": 0.5}


def kind_of(record: Mapping[str, Any]) -> Kind:
    """Records that are older than a field have its plain value. A limit above the split's length is none."""
    known = {field.name: record[field.name] for field in _FIELDS if record.get(field.name) is not None}
    limit = known.get("max_tokens")
    if limit is not None and record.get("evaluated_tokens", limit) < limit:
        del known["max_tokens"]
    return Kind(**known)
