"""Finished runs side by side: seeds folded, only what can be compared in one table, quality against cache size.

Runs are compared on one evaluation: the test split if eval_model.py has scored every run on it, else the validation
split at the end of training. Runs that differ in one of CONDITIONS stand in separate tables.
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
}
_IN_EVERY_HEADING = ("dataset", "split", "tokens", "cache_dtype")

# What makes the evaluations of two runs the same evaluation, whatever the runs' data.
_EVALUATION = ("per_document", "stride_fraction", "max_tokens", "cache_dtype", "precision")
_NEEDED = ("name", "attention", "model", "dataset", "split", "seed", "data_seed", "setup_hash", "data_fingerprint",
           "tokenizer_fingerprint", "parameters", "tokens", "perplexity", "bits_per_byte", "cache_bytes_per_token",
           "cache_dtype", "tokens_per_second")  # fmt: skip
# Of the training, not of a later evaluation. They may differ within a table, which is then said below it.
_CIRCUMSTANCES = {
    "device": "speeds cannot be compared",
    "torch": "results may differ in the last digits",
    "commit": "the code may have changed between the runs",
}

COLUMNS = ("variant", "seeds", "parameters", "tokens", "perplexity", "bits per byte", "cache bytes/token", "x MHA",
           "tokens/s")  # fmt: skip


@dataclass(frozen=True)
class Setup:
    """One configuration with its seeds folded: means and sample standard deviations (None for a single seed)."""

    variant: str  # what it is called here: its attention, and whatever else tells it from the other rows
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
    cache_bytes_per_token: int
    cache_ratio_to_mha: float | None  # None: there is no mha run of this model in the table
    tokens_per_second: float
    setup_hash: str
    runs: list[str]

    def cells(self) -> list[str]:
        """The row for people, in the order of COLUMNS."""
        return [
            self.variant,
            str(self.n),
            f"{self.parameters:,}",
            f"{self.tokens:,}",
            _with_deviation(self.perplexity, self.perplexity_deviation, 3),
            _with_deviation(self.bits_per_byte, self.bits_per_byte_deviation, 4),
            f"{self.cache_bytes_per_token:,}",
            "" if self.cache_ratio_to_mha is None else f"{self.cache_ratio_to_mha:.3f}",
            f"{self.tokens_per_second:,.0f}",
        ]


@dataclass(frozen=True)
class Table:
    """Setups that may stand side by side, the fewest bits per byte first."""

    heading: str
    conditions: dict[str, Any]
    setups: list[Setup]


@dataclass(frozen=True)
class Comparison:
    """The tables, and sentences on what was left out or must be known to read them."""

    tables: list[Table]
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as the JSON line has them."""
        return dataclasses.asdict(self)


def compare(
    folders: Sequence[Path], *, split: str | None = None, dataset: str | None = None, strict: bool = False
) -> Comparison:
    """Reads runs and compares them.

    folders: runs, or folders of runs. split and dataset ask for one evaluation of eval_model.py, on the corpus of that
    name (None: the one each run was trained on); without them the rule of this module's first lines holds. Unfinished
    runs are named and left out. Raises UserError if nothing is left, if a run lacks the evaluation asked for, or, with
    strict, if the runs cannot all stand in one table.
    """
    runs, notes = _finished_runs(_expanded(folders))
    records, source = _chosen_records(runs, split, dataset)
    records, repeated = _without_repeats(records)
    tables = _tables(records)
    if strict and len(tables) > 1:
        differing = _differing([table.conditions for table in tables])
        raise UserError(
            f"the runs cannot stand in one table, they differ in {', '.join(differing)} "
            f"({'; '.join(table.heading for table in tables)}): name runs that agree, or leave out strict=true"
        )
    if len(tables) > 1:
        names = ", ".join(_differing([table.conditions for table in tables]))
        notes.append(f"separate tables, because these runs differ in {names}")
    return Comparison(tables, [source, *notes, *repeated, *_circumstances(records)])


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
        inside = [folder] if _is_run(folder) else sorted(path for path in folder.glob("*") if _is_run(path))
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
        summary = _read(folder / "summary.json")
        missing = [key for key in _NEEDED if key not in summary]
        if missing:
            notes.append(f"left out: the summary.json of {folder.name} has no {', '.join(missing)}")
            continue
        files = sorted(folder.glob("evaluations/*.json"), key=lambda path: path.stat().st_mtime)
        runs.append(_Run(folder, summary, [_read(path) for path in files]))
    if not runs:
        raise UserError(f"no run to compare ({'; '.join(notes)}); train one with: python train_model.py attention=mla")
    return runs, notes


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}): move that run away, or train it anew") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object: move that run away, or train it anew")
    return value


def _chosen_records(runs: Sequence[_Run], split: str | None, dataset: str | None) -> tuple[list[dict[str, Any]], str]:
    """One record a run, all of the same kind of evaluation, and a sentence on which."""
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
    # Of several evaluations of a run, the kind that most runs have; of that, the newest.
    kinds = Counter(kind for records in found for kind in {_kind(record) for record in records})
    chosen = [max(enumerate(records), key=lambda pair: (kinds[_kind(pair[1])], pair[0]))[1] for records in found]
    kept = [_NEEDED[0], *_CIRCUMSTANCES]
    records = [
        run.summary | record | {key: run.summary.get(key) for key in kept}
        for run, record in zip(runs, chosen, strict=True)
    ]
    return records, f"figures of eval_model.py on the {wanted} split"


def _evaluations_on(run: _Run, split: str, dataset: str | None) -> list[dict[str, Any]]:
    """The run's evaluations on a split, of the named corpus or of its own."""
    return [
        record for record in run.evaluations
        if record.get("split") == split
        and (record.get("dataset") == dataset if dataset else
             record.get("data_fingerprint") == run.summary["data_fingerprint"])
    ]  # fmt: skip


def _kind(record: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(record.get(key) for key in _EVALUATION)


def _without_repeats(records: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """One record for each setup and seed: two runs of one seed say nothing about the spread over seeds."""
    kept: dict[tuple[Any, ...], dict[str, Any]] = {}
    notes = []
    for record in records:
        key = (record["setup_hash"], record["seed"], record["data_seed"])
        if key in kept:
            notes.append(f"left out: {record['name']} repeats {kept[key]['name']}, setup and seed are the same")
        else:
            kept[key] = record
    return list(kept.values()), notes


# --- tables ----------------------------------------------------------------------------------------------------------


def _tables(records: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Records with equal conditions share a table; the largest table comes first."""
    grouped: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for record in records:
        grouped.setdefault(tuple(record.get(key) for key in CONDITIONS), []).append(record)
    all_conditions = [dict(zip(CONDITIONS, values, strict=True)) for values in grouped]
    shown = [key for key in CONDITIONS if key in _IN_EVERY_HEADING or key in _differing(all_conditions)]
    tables = [
        Table(_heading(conditions, shown), conditions, _setups(members))
        for conditions, members in zip(all_conditions, grouped.values(), strict=True)
    ]
    return sorted(tables, key=lambda table: (-len(table.setups), table.heading))


def _differing(conditions: Sequence[Mapping[str, Any]]) -> list[str]:
    return [key for key in CONDITIONS if any(other[key] != conditions[0][key] for other in conditions)]


def _heading(conditions: Mapping[str, Any], shown: Sequence[str]) -> str:
    return ", ".join(
        CONDITIONS[key].format(conditions[key]) if conditions[key] is not None else f"{key} unknown" for key in shown
    )


def _setups(records: Sequence[Mapping[str, Any]]) -> list[Setup]:
    """Records of one setup folded into one row each."""
    grouped: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        grouped.setdefault(record["setup_hash"], []).append(record)
    groups = list(grouped.values())
    mha_bytes = {
        group[0]["model"]: group[0]["cache_bytes_per_token"] for group in groups if group[0]["attention"] == "mha"
    }
    setups = []
    for group, label in zip(groups, _labels([group[0] for group in groups]), strict=True):
        first = group[0]
        perplexity, perplexity_deviation = _mean_and_deviation([record["perplexity"] for record in group])
        bits, bits_deviation = _mean_and_deviation([record["bits_per_byte"] for record in group])
        mha = mha_bytes.get(first["model"])
        setups.append(
            Setup(
                variant=label, attention=first["attention"], model=first["model"],
                n=len(group), seeds=sorted(record["seed"] for record in group),
                parameters=first["parameters"], tokens=first["tokens"],
                perplexity=perplexity, perplexity_deviation=perplexity_deviation,
                bits_per_byte=bits, bits_per_byte_deviation=bits_deviation,
                cache_bytes_per_token=first["cache_bytes_per_token"],
                cache_ratio_to_mha=first["cache_bytes_per_token"] / mha if mha else None,
                tokens_per_second=statistics.fmean(record["tokens_per_second"] for record in group),
                setup_hash=first["setup_hash"], runs=[record["name"] for record in group],
            )
        )  # fmt: skip
    return sorted(setups, key=lambda setup: setup.bits_per_byte)


def _labels(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """A short name for each setup: its attention, with what else tells it from the others."""
    several_models = len({record["model"] for record in records}) > 1
    labels = [
        f"{record['attention']} {record['model']}" if several_models else record["attention"] for record in records
    ]
    counts = Counter(labels)
    return [
        label if counts[label] == 1 else _distinguishing_name(record)
        for label, record in zip(labels, records, strict=True)
    ]


def _distinguishing_name(record: Mapping[str, Any]) -> str:
    """dataset-model-attention-overrides-seed0-data1, the default name of a run, without its dataset and seeds."""
    name = re.sub(r"-seed\d+(-data\d+)?$", "", record["name"])
    return name.partition(f"-{record['model']}-")[2] or name


def _mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


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


def as_text(comparison: Comparison) -> str:
    """Aligned columns for a terminal."""
    lines = []
    for table in comparison.tables:
        rows = [list(COLUMNS), *(setup.cells() for setup in table.setups)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
        lines += [table.heading, ""]
        lines += [
            "  ".join(cell.ljust(width) if column == 0 else cell.rjust(width)
                      for column, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
            for row in rows
        ]  # fmt: skip
        lines.append("")
    return "\n".join(lines + [f"note: {note}" for note in comparison.notes])


def as_markdown(comparison: Comparison) -> str:
    """One section a table."""
    lines = []
    for table in comparison.tables:
        lines += [f"### {table.heading}", "", _markdown_row(COLUMNS)]
        lines.append(_markdown_row(["---"] + ["---:"] * (len(COLUMNS) - 1)))
        lines += [_markdown_row(setup.cells()) for setup in table.setups]
        lines.append("")
    return "\n".join(lines + [f"- {note}" for note in comparison.notes]) + "\n"


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def plain_table(comparison: Comparison) -> tuple[list[str], list[list[Any]]]:
    """Column names and unrounded rows of all tables in one, each row with its conditions."""
    fields = [field.name for field in dataclasses.fields(Setup) if field.name != "tokens"]
    rows = [
        [" ".join(map(str, value)) if isinstance(value := getattr(setup, name), list) else value for name in fields]
        + list(table.conditions.values())
        for table in comparison.tables for setup in table.setups
    ]  # fmt: skip
    return [*fields, *CONDITIONS], rows


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
