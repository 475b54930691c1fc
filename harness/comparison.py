"""Finished runs side by side: seeds folded, only what can be compared in one table, quality against cache size.

Runs are compared on one evaluation: the test split if eval_model.py has scored every run on it, else the validation
split at the end of training; of a run's evaluations one without a cache, where there is one. Runs that differ in one of
CONDITIONS stand in separate tables. With every cache, the evaluations of a run that differ in nothing but the cache are
rows of one table instead, so that savings of the architecture stand beside those of quantising and of evicting.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import UserError
from harness.outside import read_object

# Figures can be compared where all of these agree. Key in a run's records -> how a value reads in a heading.
CONDITIONS = {
    "dataset": "dataset {}",
    "data_fingerprint": "data {:.8}",
    "tokenizer_fingerprint": "tokenizer {:.8}",
    "split": "{} split",
    "evaluated_tokens": "scored on {:,} tokens",
    "per_document": "per_document={}",
    "stride_fraction": "stride_fraction={}",
    "tokens": "trained on {:,} tokens",
    "cache_dtype": "cache in {}",
    "through_cache": "through_cache={}",
    "cache_window": "window {}",
    "cache_sinks": "{} sinks",
}
_IN_EVERY_HEADING = ("dataset", "split", "tokens", "cache_dtype")

# What makes the evaluations of two runs the same evaluation, whatever the runs' data: how it was done, on which cache.
_PROTOCOL = ("per_document", "stride_fraction", "max_tokens", "precision")
_CACHE = ("cache_dtype", "through_cache", "cache_window", "cache_sinks")
_KIND = (*_PROTOCOL, *_CACHE)
_PLAIN = {"through_cache": False, "cache_window": None, "cache_sinks": 0}
_EIGHT_BITS = ("int8", "fp8")  # never only quoted by eval_model.py
# What records lack that were written before evaluations through a cache.
_FORMERLY = _PLAIN | {"cache_context": None, "cache_bytes_at_context": None}
_NEEDED = ("name", "attention", "model", "dataset", "split", "seed", "data_seed", "setup_hash", "data_fingerprint",
           "tokenizer_fingerprint", "parameters", "tokens", "perplexity", "bits_per_byte", "cache_bytes_per_token",
           "cache_dtype", "tokens_per_second")  # fmt: skip
# What a record's values are, where it has them.
_TEXT, _COUNT, _FIGURE = (str,), (int,), (int, float)
_FORMS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("name", "attention", "model", "dataset", "split", "setup_hash", "data_fingerprint",
                     "tokenizer_fingerprint", "cache_dtype"), _TEXT),
    **dict.fromkeys(("seed", "data_seed", "parameters", "tokens", "evaluated_tokens", "cache_bytes_per_token",
                     "cache_sinks"), _COUNT),
    **dict.fromkeys(("perplexity", "bits_per_byte"), _FIGURE),
    **dict.fromkeys(("stride_fraction", "tokens_per_second", "cache_ratio_to_mha", "mha_cache_bytes_per_token",
                     "cache_elements_per_token_per_layer"), (*_FIGURE, type(None))),
    **dict.fromkeys(("cache_window", "cache_context", "cache_bytes_at_context", "max_tokens"), (*_COUNT, type(None))),
    **dict.fromkeys(("device", "torch", "commit"), (*_TEXT, type(None))),
    **dict.fromkeys(("through_cache", "per_document"), (bool,)),
}  # fmt: skip
# Of the training, not of a later evaluation. They may differ within a table, which is then said below it.
_CIRCUMSTANCES = {
    "device": "speeds cannot be compared",
    "torch": "results may differ in the last digits",
    "commit": "the code may have changed between the runs",
}


@dataclass(frozen=True)
class Setup:
    """One configuration, on one cache, seeds folded: means and sample standard deviations (None for a single seed)."""

    variant: str  # what it is called here: its attention, and whatever else tells it from the other rows
    cache: str  # the part of that name which tells caches of one configuration apart, or nothing
    attention: str
    model: str
    n: int
    seeds: list[int]
    parameters: int
    tokens: int
    perplexity: float
    perplexity_deviation: float | None
    bits_per_byte: float
    bits_per_byte_deviation: float | None
    cache_dtype: str
    through_cache: bool  # scored through such a cache, not only quoted for it
    cache_window: int | None
    cache_sinks: int
    cache_bytes_per_token: int  # of a token that is held
    cache_context: int | None  # None: the record is older than this and the next figure
    cache_bytes_at_context: int | None
    cache_bytes_per_context_token: float  # of a token that was read: fewer than the above where a window evicts
    cache_ratio_to_mha: float | None  # MHA of this model's heads and layers; None: the record is older
    tokens_per_second: float | None  # None: imported or converted, not trained
    setup_hash: str
    runs: list[str]

    @property
    def configuration(self) -> str:
        """The name without the cache."""
        return self.variant.removesuffix(f", {self.cache}")


@dataclass(frozen=True)
class Table:
    """Setups that may stand side by side, the fewest bits per byte first."""

    heading: str
    conditions: dict[str, Any]
    setups: list[Setup]

    @property
    def has_caches_as_rows(self) -> bool:
        return "cache_dtype" not in self.conditions

    def cache_size(self, setup: Setup) -> float:
        """What quality is plotted against: bytes per token, of the context where a window may hold fewer tokens."""
        return setup.cache_bytes_per_context_token if self.has_caches_as_rows else setup.cache_bytes_per_token

    def cells(self) -> list[list[str]]:
        """The table for people: names of columns, then a row a setup."""
        contexts = {setup.cache_context for setup in self.setups if setup.cache_context is not None}
        at_context = f"cache bytes at {max(contexts):,} tokens" if len(contexts) == 1 else "cache bytes at context"
        rows = []
        for setup in self.setups:
            row = {
                "variant": setup.variant,
                "seeds": str(setup.n),
                "parameters": f"{setup.parameters:,}",
                "tokens": f"{setup.tokens:,}",
                "perplexity": _with_deviation(setup.perplexity, setup.perplexity_deviation, 3),
                "bits per byte": _with_deviation(setup.bits_per_byte, setup.bits_per_byte_deviation, 4),
                "cache bytes/token": f"{setup.cache_bytes_per_token:,}",
            }
            if self.has_caches_as_rows:
                allocated = "" if setup.cache_bytes_at_context is None else f"{setup.cache_bytes_at_context:,}"
                which = f" at {setup.cache_context:,}" if allocated and len(contexts) > 1 else ""
                row[at_context] = allocated + which
            row["x MHA"] = "" if setup.cache_ratio_to_mha is None else f"{setup.cache_ratio_to_mha:.3f}"
            row["tokens/s"] = "" if setup.tokens_per_second is None else f"{setup.tokens_per_second:,.0f}"
            rows.append(row)
        return [list(rows[0]), *(list(row.values()) for row in rows)]


@dataclass(frozen=True)
class Comparison:
    """The tables, and sentences on what was left out or must be known to read them."""

    tables: list[Table]
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as the JSON line has them."""
        return dataclasses.asdict(self)


def compare(
    folders: Sequence[Path],
    *,
    split: str | None = None,
    dataset: str | None = None,
    every_cache: bool = False,
    strict: bool = False,
) -> Comparison:
    """Reads runs and compares them.

    folders: runs, or folders of runs. split and dataset ask for one evaluation of eval_model.py, on the corpus of that
    name (None: the one each run was trained on); without them the rule of this module's first lines holds. every_cache:
    a run's evaluations that differ from the chosen one only in the cache become rows too. Unfinished runs are named and
    left out. Raises UserError if nothing is left, if a run lacks the evaluation asked for, or, with strict, if the runs
    cannot all stand in one table.
    """
    finished, notes = _finished_runs(_expanded(folders))
    runs, repeated = _without_repeats(finished)
    records, source = _chosen_records(runs, split, dataset, every_cache)
    tables = _tables(records, every_cache)
    if strict and len(tables) > 1:
        differing = _differing([table.conditions for table in tables])
        raise UserError(
            f"the runs cannot stand in one table, they differ in {', '.join(differing)} "
            f"({'; '.join(table.heading for table in tables)}): name runs that agree, or leave out strict=true"
        )
    if len(tables) > 1:
        names = ", ".join(_differing([table.conditions for table in tables]))
        notes.append(f"separate tables, because these runs differ in {names}")
    if every_cache:
        notes.append("x MHA: cache bytes per token of context, over those of MHA with the model's heads in bfloat16")
    return Comparison(tables, [source, *notes, *repeated, *_uneven_seeds(tables), *_circumstances(records)])


# --- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Run:
    folder: Path
    summary: dict[str, Any]
    evaluations: list[dict[str, Any]]  # the newest last


def _expanded(folders: Sequence[Path]) -> list[Path]:
    """Every run once, in the order given; a folder of runs stands for all of them."""
    found: dict[Path, Path] = {}
    for folder in folders:
        inside = [folder] if _is_run(folder) else sorted(path for path in folder.glob("[!.]*") if _is_run(path))
        if not inside:
            raise UserError(f"{folder} is neither a run nor a folder of runs; train one with: python train_model.py")
        found |= {path.resolve(): path for path in inside if path.resolve() not in found}
    return list(found.values())


def _is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file() or (folder / "summary.json").is_file()


def _finished_runs(folders: Sequence[Path]) -> tuple[list[_Run], list[str]]:
    """The runs that can be compared, and a sentence for those that cannot."""
    unfinished = [folder for folder in folders if not (folder / "summary.json").is_file()]
    notes = [f"left out, not finished: {', '.join(folder.name for folder in unfinished)}"] if unfinished else []
    runs: list[_Run] = []
    for folder in folders:
        if folder in unfinished:
            continue
        summary = _FORMERLY | _read(folder / "summary.json")
        missing = [key for key in _NEEDED if key not in summary]
        if missing:
            notes.append(f"left out: the summary.json of {folder.name} has no {', '.join(missing)}")
            continue
        files = sorted(folder.glob("evaluations/*.json"), key=lambda path: path.stat().st_mtime)
        runs.append(_Run(folder, summary, [_FORMERLY | _read(path) for path in files]))
    if not runs:
        raise UserError(f"no run to compare ({'; '.join(notes)}); train one with: python train_model.py attention=mla")
    return runs, notes


def _read(path: Path) -> dict[str, Any]:
    try:
        value = read_object(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}): move that run away, or train it anew") from None
    for key, kinds in _FORMS.items():
        if key in value and not (isinstance(value[key], kinds) and _is_sound(value[key], key)):
            raise UserError(f"{path} has a {key} of the wrong kind: move that run away, or train it anew")
    return value


def _is_sound(value: Any, key: str) -> bool:
    """Figures that can be counted, averaged and divided by."""
    if not isinstance(value, (int, float)):
        return True
    return (1 if key == "cache_context" else 0) <= value < 2**63 or (isinstance(value, float) and 0 <= value < 1e100)


def _chosen_records(
    runs: Sequence[_Run], split: str | None, dataset: str | None, every_cache: bool
) -> tuple[list[dict[str, Any]], str]:
    """One record a run, all of the same kind of evaluation, or one a run and cache; and a sentence on which."""
    wanted = split or "test"
    found = [_evaluations_on(run, wanted, dataset) for run in runs]
    lacking = [run.folder for run, records in zip(runs, found, strict=True) if not records]
    if lacking and (dataset is not None or split in ("train", "test")):
        command = f"python eval_model.py run={lacking[0]} split={wanted}" + (f" dataset={dataset}" if dataset else "")
        raise UserError(
            f"{len(lacking)} of {len(runs)} runs have no evaluation on split={wanted}"
            f"{f' of dataset={dataset}' if dataset else ''}, the first is {lacking[0].name}; make it with: {command}"
        )
    if lacking:
        remedy = " (for the test split first run: python eval_model.py run=all)" if split is None else ""
        return [run.summary for run in runs], f"final validation figures of each run{remedy}"
    # Of several evaluations of a run, one without a cache; of those the kind that most runs have; of that, the newest.
    kinds = Counter(kind for evaluations in found for kind in {_values(record, _KIND) for record in evaluations})
    records, others = [], 0
    for run, evaluations in zip(runs, found, strict=True):
        _, chosen = max(
            enumerate(evaluations),
            key=lambda pair: (not pair[1]["through_cache"], kinds[_values(pair[1], _KIND)], pair[0]),
        )
        rows = [chosen]
        if every_cache:
            alike = [record for record in evaluations if _values(record, _PROTOCOL) == _values(chosen, _PROTOCOL)]
            rows = list({_values(record, _CACHE): record for record in alike}.values())  # the newest of each cache
            others += len(evaluations) - len(alike)
        kept = {key: run.summary.get(key) for key in (_NEEDED[0], *_CIRCUMSTANCES)}
        records += [run.summary | record | kept for record in rows]
    left_out = f"; left out: {others} that differ in {', '.join(_PROTOCOL)}" if others else ""
    return records, f"figures of eval_model.py on the {wanted} split{left_out}"


def _evaluations_on(run: _Run, split: str, dataset: str | None) -> list[dict[str, Any]]:
    """The run's evaluations on a split, of the named corpus or of its own."""
    return [
        record for record in run.evaluations
        if record.get("split") == split
        and (record.get("dataset") == dataset if dataset else
             record.get("data_fingerprint") == run.summary["data_fingerprint"])
    ]  # fmt: skip


def _values(record: Mapping[str, Any], keys: Sequence[str]) -> tuple[Any, ...]:
    return tuple(record.get(key) for key in keys)


def _without_repeats(runs: Sequence[_Run]) -> tuple[list[_Run], list[str]]:
    """One run for each setup and seed: two runs of one seed say nothing about the spread over seeds."""
    kept: dict[tuple[Any, ...], _Run] = {}
    notes = []
    for run in runs:
        first = kept.setdefault(_values(run.summary, ("setup_hash", "seed", "data_seed")), run)
        if first is not run:
            name, other = run.summary["name"], first.summary["name"]
            notes.append(f"left out: {name} repeats {other}, setup and seed are the same")
    return list(kept.values()), notes


# --- tables ----------------------------------------------------------------------------------------------------------


def _tables(records: Sequence[Mapping[str, Any]], every_cache: bool) -> list[Table]:
    """Records with equal conditions share a table; the largest table comes first."""
    keys = [key for key in CONDITIONS if not (every_cache and key in _CACHE)]
    grouped: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for record in records:
        grouped.setdefault(_values(record, keys), []).append(record)
    all_conditions = [dict(zip(keys, values, strict=True)) for values in grouped]
    # A cache that figures were scored through is said even where all tables have it.
    differing = _differing([*all_conditions, all_conditions[0] | _PLAIN])
    shown = [key for key in keys if key in _IN_EVERY_HEADING or key in differing]
    tables = []
    for conditions, members in zip(all_conditions, grouped.values(), strict=True):
        heading, unsaid = _heading(conditions, shown), None
        quoted = {record["cache_dtype"] for record in members if not record["through_cache"]}
        if every_cache and len(quoted) == 1:
            unsaid = quoted.pop()
            heading += f", cache in {unsaid} where a row says nothing else"
        tables.append(Table(heading, conditions, _setups(members, every_cache, unsaid)))
    return sorted(tables, key=lambda table: (-len(table.setups), table.heading))


def _differing(conditions: Sequence[Mapping[str, Any]]) -> list[str]:
    return [key for key in conditions[0] if any(other[key] != conditions[0][key] for other in conditions)]


def _heading(conditions: Mapping[str, Any], shown: Sequence[str]) -> str:
    absent = {"cache_window": "no window"}
    return ", ".join(
        absent.get(key, f"{key} unknown") if conditions[key] is None else CONDITIONS[key].format(conditions[key])
        for key in shown
    )


def _setups(records: Sequence[Mapping[str, Any]], every_cache: bool, unsaid: str | None) -> list[Setup]:
    """Records of one setup on one cache folded into one row each."""
    grouped: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for record in records:
        grouped.setdefault(_values(record, ("setup_hash", *_CACHE)), []).append(record)
    groups = list(grouped.values())
    firsts = [group[0] for group in groups]
    names = _names(firsts)
    setups = []
    for first, group in zip(firsts, groups, strict=True):
        name, cache = names[first["setup_hash"]], _row_label(first, unsaid) if every_cache else ""
        perplexity, perplexity_deviation = _mean_and_deviation([record["perplexity"] for record in group])
        bits, bits_deviation = _mean_and_deviation([record["bits_per_byte"] for record in group])
        per_token, mha = _bytes_per_context_token(first), first.get("mha_cache_bytes_per_token")
        ratio = first.get("cache_ratio_to_mha")  # of elements, whatever the dtype
        if every_cache:
            ratio = per_token / mha if mha else None
        setups.append(
            Setup(
                variant=f"{name}, {cache}" if cache else name, cache=cache,
                attention=first["attention"], model=first["model"],
                n=len(group), seeds=sorted(record["seed"] for record in group),
                parameters=first["parameters"], tokens=first["tokens"],
                perplexity=perplexity, perplexity_deviation=perplexity_deviation,
                bits_per_byte=bits, bits_per_byte_deviation=bits_deviation,
                cache_dtype=first["cache_dtype"], through_cache=first["through_cache"],
                cache_window=first["cache_window"], cache_sinks=first["cache_sinks"],
                cache_bytes_per_token=first["cache_bytes_per_token"], cache_context=first["cache_context"],
                cache_bytes_at_context=first["cache_bytes_at_context"], cache_bytes_per_context_token=per_token,
                cache_ratio_to_mha=ratio,
                tokens_per_second=_mean_speed(group),
                setup_hash=first["setup_hash"], runs=[record["name"] for record in group],
            )
        )  # fmt: skip
    return sorted(setups, key=lambda setup: setup.bits_per_byte)


def _mean_speed(records: Sequence[Mapping[str, Any]]) -> float | None:
    speeds = [record["tokens_per_second"] for record in records]
    return None if None in speeds else statistics.fmean(speeds)


def _bytes_per_context_token(record: Mapping[str, Any]) -> float:
    """Cache bytes at the context over its tokens; older records know no context, and no window that would evict."""
    if record["cache_bytes_at_context"] is None:
        return float(record["cache_bytes_per_token"])
    return float(record["cache_bytes_at_context"] / record["cache_context"])


def cache_label(record: Mapping[str, Any], unsaid: str | None = None) -> str:
    """What an evaluation's cache keeps, for people: `int8`, or `window 64, 4 sinks`; the dtype `unsaid` is left out."""
    dtype, window, sinks = (record[key] for key in ("cache_dtype", "cache_window", "cache_sinks"))
    parts = [
        dtype if dtype != unsaid else "",
        f"window {window}" if window is not None else "",
        f"{sinks} sink{'s' if sinks > 1 else ''}" if sinks else "",
    ]
    return ", ".join(filter(None, parts))


def _row_label(record: Mapping[str, Any], unsaid: str | None) -> str:
    """The same, and how it was scored where its cache does not imply that; nothing for a plain evaluation in `unsaid`."""
    implied = record["cache_window"] is not None or record["cache_dtype"] in _EIGHT_BITS
    how = "" if record["through_cache"] == implied else "through the cache" if record["through_cache"] else "quoted"
    return ", ".join(filter(None, (cache_label(record, unsaid), how)))


def _names(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """A short name by setup_hash: its attention, with what else tells it from the other setups."""
    setups = {record["setup_hash"]: record for record in reversed(records)}
    several_models = len({record["model"] for record in records}) > 1
    names = {
        key: f"{record['attention']} {record['model']}" if several_models else record["attention"]
        for key, record in setups.items()
    }
    counts = Counter(names.values())
    return {key: name if counts[name] == 1 else _distinguishing_name(setups[key]) for key, name in names.items()}


def _distinguishing_name(record: Mapping[str, Any]) -> str:
    """dataset-model-attention-overrides-seed0-data1, the default name of a run, without its dataset and seeds."""
    name = re.sub(r"-seed\d+(-data\d+)?$", "", record["name"])
    return name.partition(f"-{record['model']}-")[2] or name


def _mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def _uneven_seeds(tables: Sequence[Table]) -> list[str]:
    """A sentence for each configuration whose caches were not scored on the same seeds."""
    notes = []
    for table in tables:
        seeds: dict[str, set[tuple[int, ...]]] = {}
        for setup in table.setups:
            seeds.setdefault(setup.configuration, set()).add(tuple(setup.seeds))
        notes += [
            f"the caches of {name} were scored on different seeds: what lies between them is not only the cache"
            for name, sets in seeds.items() if len(sets) > 1
        ]  # fmt: skip
    return notes


def _circumstances(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for each circumstance in which the runs differ."""
    notes = []
    for key, consequence in _CIRCUMSTANCES.items():
        values = sorted({str(record.get(key)) for record in records})
        if len(values) > 1:
            notes.append(f"{key} differs ({'; '.join(values)}): {consequence}")
    return notes


# --- writing ---------------------------------------------------------------------------------------------------------


def _with_deviation(mean: float, deviation: float | None, digits: int) -> str:
    return f"{mean:.{digits}f}" if deviation is None else f"{mean:.{digits}f} ± {deviation:.{digits}f}"


def aligned(rows: Sequence[Sequence[str]], *, left: Sequence[int] = (0,)) -> list[str]:
    """The lines of a table for a terminal; the columns in `left` begin at the left, the others end at the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) if column in left else cell.rjust(width)
                  for column, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in rows
    ]  # fmt: skip


def as_text(comparison: Comparison) -> str:
    """Aligned columns for a terminal."""
    lines = []
    for table in comparison.tables:
        lines += [table.heading, "", *aligned(table.cells()), ""]
    return "\n".join(lines + [f"note: {note}" for note in comparison.notes])


def as_markdown(comparison: Comparison) -> str:
    """One section a table."""
    lines = []
    for table in comparison.tables:
        columns, *rows = table.cells()
        lines += [f"### {table.heading}", "", _markdown_row(columns)]
        lines.append(_markdown_row(["---"] + ["---:"] * (len(columns) - 1)))
        lines += [_markdown_row(row) for row in rows]
        lines.append("")
    return "\n".join(lines + [f"- {note}" for note in comparison.notes]) + "\n"


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def plain_table(comparison: Comparison) -> tuple[list[str], list[list[Any]]]:
    """Column names and unrounded rows of all tables in one, each row with its conditions."""
    columns = [field.name for field in dataclasses.fields(Setup) if field.name not in CONDITIONS] + list(CONDITIONS)
    rows = []
    for table in comparison.tables:
        for setup in table.setups:
            values = dataclasses.asdict(setup) | table.conditions
            row = (values[column] for column in columns)
            rows.append([" ".join(map(str, value)) if isinstance(value, list) else value for value in row])
    return columns, rows


def as_csv(comparison: Comparison) -> str:
    """`plain_table` as comma-separated values."""
    columns, rows = plain_table(comparison)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    return text.getvalue()


def write_tables(comparison: Comparison, folder: Path) -> list[Path]:
    """comparison.md, comparison.csv and comparison.json in a folder, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        "comparison.md": as_markdown(comparison),
        "comparison.csv": as_csv(comparison),
        "comparison.json": json.dumps(comparison.as_dict(), indent=2) + "\n",
    }
    for name, text in contents.items():
        aside = folder / f"{name}.unfinished"
        aside.write_text(text, encoding="utf-8")
        aside.replace(folder / name)
    return [folder / name for name in contents]
