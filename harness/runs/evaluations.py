"""Which evaluation of a run stands for it: one rule for tables, pictures and studies.

A plain evaluation comes before one through a cache, a whole split before a part of it, then the way of scoring that most
of the runs share, then the newest. The file's time says nothing (a copied run has another): a record knows its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from harness.files.text import counted
from harness.runs.kind import Kind, kind_of
from harness.runs.records import Evaluation, when_made
from modeling.cache_formats import read_format
from modeling.refusal import Refusal


def judges(record: Evaluation, dataset: str) -> bool:
    """Whether a run trained on that dataset is judged by it: on the test split of its own corpus, without a cache."""
    return (record["split"], record["dataset"]) == ("test", dataset) and not record.get("through_cache")


def common_kind(pools: Sequence[Sequence[Mapping[str, Any]]]) -> Kind | None:
    """The kind of evaluation to compare runs by; a pool holds one run's records. None where there are none.

    It has no cache if any has none; of those it is the one that most runs have; of those the one of most tokens, then the
    one with the usual stride and no borders between documents, then the newest.
    """
    # In the order of the records, so that of equals every process finds the same one.
    holders = Counter(kind for pool in pools for kind in dict.fromkeys(map(kind_of, pool)))
    newest: dict[Kind, tuple[int, str]] = {}
    for record in (record for pool in pools for record in pool):
        kind, here = kind_of(record), (record.get("evaluated_tokens") or 0, when_made(record))
        newest[kind] = max(here, newest.get(kind, here))

    def rank(kind: Kind) -> tuple[Any, ...]:
        tokens, made = newest[kind]
        usual = (kind.has_usual_stride, not kind.per_document)
        return not kind.through_cache, holders[kind], kind.max_tokens is None, tokens, usual, made

    return max(holders, key=rank, default=None)


def by_preference(pools: Sequence[Sequence[Evaluation]]) -> list[list[Evaluation]]:
    """Each run's records, the one that stands for it last: of the kind that `common_kind` finds first of all."""
    kind = common_kind(pools)
    precisions = Counter(record.get("precision") for pool in pools for record in pool if kind_of(record) == kind)

    def rank(record: Evaluation) -> tuple[Any, ...]:
        own = kind_of(record)
        whole = own.max_tokens is None
        return own == kind, not own.through_cache, whole, precisions[record.get("precision")], when_made(record)

    return [sorted(pool, key=rank) for pool in pools]  # stable: of equals the one that was read last


def cache_label(record: Mapping[str, Any], unsaid: str | None = None) -> str:
    """What an evaluation's cache keeps, for people: `int8`, or `window 64, 4 sinks`; the dtype `unsaid` is left out."""
    dtype, window, sinks = (record[key] for key in ("cache_dtype", "cache_window", "cache_sinks"))
    parts = [
        dtype if dtype != unsaid else "",
        f"window {window}" if window is not None else "",
        counted(sinks, "sink") if sinks else "",
    ]
    return ", ".join(filter(None, parts))


def in_few_bits(record: Mapping[str, Any]) -> bool:
    """Whether its cache stores something in less than 16 bits; a format of another version is not known to."""
    try:
        return read_format(record["cache_dtype"]).in_few_bits
    except Refusal:
        return False
