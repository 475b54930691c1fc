"""Finished runs side by side: seeds folded, only what can be compared in one table, quality against cache size.

Runs that were trained on as many tokens of the same data are compared on one evaluation: of the whole test split if
eval_model.py has scored any of them on it, else of the validation split at the end of training. Which one of several, see
harness/runs/evaluations.py; a run without it is listed and changes nothing for the others, and an evaluation of a part of a
split is compared only when it is named. Runs that differ in one of CONDITIONS stand in separate tables. With every cache,
the evaluations of a run that differ in nothing but the cache are rows of one table instead, so that savings of the
architecture stand beside those of quantising and of evicting.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.config.schema import CACHE_CONTEXTS
from harness.errors import UserError
from harness.evaluation.metric import SCORES
from harness.files.atomic import write_text
from harness.files.text import (
    aligned,
    at_tokens,
    counted,
    csv_text,
    markdown,
    markdown_row,
    mebibytes,
    some_of,
    span,
    table_of,
    visible,
)
from harness.report.document import at_contexts
from harness.report.run_choice import SEEDS, Request, choose, grouped, values_at
from harness.runs.evaluations import cache_label, in_few_bits
from harness.runs.kind import CACHE, HEADINGS, PROTOCOL, USUAL
from harness.runs.records import FIGURES

# Figures can be compared where all of these agree. Key in a run's records -> how a value reads in a heading.
CONDITIONS = {
    "dataset": "dataset {}",
    "data_fingerprint": "data {:.8}",
    "tokenizer_fingerprint": "tokenizer {:.8}",
    "split": "{} split",
    "evaluated_tokens": "scored on {:,} tokens",
    **{key: heading for key, heading in HEADINGS.items() if key in PROTOCOL},
    "tokens": "trained on {:,} tokens",
    **{key: HEADINGS[key] for key in CACHE},
}
_IN_EVERY_HEADING = ("dataset", "split", "evaluated_tokens", "tokens", "cache_dtype")
_COMPARED = SCORES | FIGURES  # no probe's: of those no condition says how much was measured
_ONE_ROW = ("setup_hash", *CACHE)
# They may differ within a table, which is then said below it. The first three are the training's.
_CIRCUMSTANCES = {
    "device": "speeds cannot be compared",
    "torch": "results may differ in the last digits",
    "commit": "the code may have changed between the runs",
    "precision": "evaluated alike, results would differ in the third or fourth digit",
}


@dataclass(frozen=True)
class Setup:
    """One configuration, on one cache, seeds folded."""

    variant: str  # what it is called here: its attention, and whatever else tells it from the other rows
    configuration: str  # that name without its cache
    cache: str  # what tells caches of one configuration apart, or nothing
    attention: str
    model: str
    n: int
    seeds: list[int]
    means: dict[str, Any]  # of each of _COMPARED, as it stands where the seeds agree; None where a record lacks it
    deviations: dict[str, float | None]  # of each of SCORES: of the sample, None for a single seed
    bits_per_byte_half_width: float | None  # of the mean's 95 % interval, the scatter pooled over the table's setups
    cache_dtype: str
    through_cache: bool  # scored through such a cache, not only quoted for it
    cache_window: int | None
    cache_sinks: int
    cache_context: int | None  # None: the record is older than this and the next figure
    cache_bytes_at_context: int | None
    cache_bytes_by_context: dict[str, int] | None  # of one sequence, by its tokens; None: the record is older
    cache_bytes_per_context_token: float  # of a token that was read: fewer than the above where a window evicts
    setup_hash: str
    runs: list[str]

    @property
    def bits_per_byte(self) -> float:
        return float(self.means["bits_per_byte"])

    def cell(self, key: str) -> str:
        """A figure, with its deviation over seeds where there are several; nothing where it is not known."""
        figures = (self.means[key], self.deviations.get(key))
        return " ± ".join(filter(None, map(_COMPARED[key].text, figures)))

    def plain(self) -> dict[str, Any]:
        """All of it under one name each, unrounded."""
        fields = dataclasses.asdict(self)
        deviations = {f"{key}_deviation": value for key, value in fields.pop("deviations").items()}
        return fields | fields.pop("means") | deviations


@dataclass(frozen=True)
class ComparisonTable:
    """Setups that may stand side by side, the fewest bits per byte first."""

    heading: str
    conditions: dict[str, Any]
    setups: list[Setup]
    caution: str  # what the order of the rows is worth

    @property
    def has_caches_as_rows(self) -> bool:
        return "cache_dtype" not in self.conditions

    def cache_size(self, setup: Setup) -> float:
        """What quality is plotted against: bytes per token, of the context where a window may hold fewer tokens."""
        return setup.cache_bytes_per_context_token if self.has_caches_as_rows else setup.means["cache_bytes_per_token"]

    @property
    def at_tokens(self) -> str:
        """Where cache sizes are quoted: with windows or states a token of a longer context takes less."""
        return at_tokens([setup.cache_context for setup in self.setups])

    def cells(self) -> list[list[str]]:
        """The table for people: names of columns, then a row a setup."""
        columns = {"variant": [setup.variant for setup in self.setups], "seeds": [str(setup.n) for setup in self.setups]}
        for key, shown in _COMPARED.items():
            if key in _IN_EVERY_HEADING:  # one value a table
                continue
            name, cells = shown.unit, [setup.cell(key) for setup in self.setups]
            if key == "cache_bytes_per_token":
                name, cells = self._at_contexts(name, cells)
            columns[name] = cells
            if key == "bits_per_byte":
                halves = [setup.bits_per_byte_half_width for setup in self.setups]
                columns["95 %"] = ["" if half is None else f"± {half:.4f}" for half in halves]
            if key == "cache_bytes_per_token" and self.has_caches_as_rows:
                sizes = [setup.cache_bytes_at_context for setup in self.setups]
                name, cells = self._at_contexts("cache bytes", ["" if size is None else f"{size:,}" for size in sizes])
                columns[name] = cells
            if key == "cache_ratio_to_mha":
                for number, context in enumerate(CACHE_CONTEXTS):
                    sizes = [(setup.cache_bytes_by_context or {}).get(str(context)) for setup in self.setups]
                    name = f"{'' if number else 'MiB '}at {context // 1024}k"  # the unit once: four columns are wide
                    columns[name] = ["" if size is None else mebibytes(size) for size in sizes]
        known = {name: cells for name, cells in columns.items() if any(cells)}
        return [[*known], *map(list, zip(*known.values(), strict=True))]

    def _at_contexts(self, name: str, cells: list[str]) -> tuple[str, list[str]]:
        return at_contexts(name, cells, [setup.cache_context for setup in self.setups])


@dataclass(frozen=True)
class Comparison:
    """The tables, and sentences on what was left out or must be known to read them."""

    tables: list[ComparisonTable]
    notes: list[str]
    lacking: list[str]  # names of the runs without the evaluation that the others are compared on


def compare(
    folders: Sequence[Path],
    *,
    split: str | None = None,
    dataset: str | None = None,
    evaluation: str | None = None,
    every_cache: bool = False,
    strict: bool = False,
) -> Comparison:
    """Reads runs and compares them.

    folders: runs, or folders of runs. split and dataset ask for one evaluation of eval_model.py, on the corpus of that
    name (None: the one each run was trained on), evaluation for the one of that name (a file of evaluations/, without
    .json) or made with that option ("max_tokens=8000"), which may be of a part of a split; without them the rule of this
    module's first lines holds. every_cache: a
    run's evaluations that differ from the chosen one only in the cache become rows too. Runs that are unfinished or lack
    the evaluation are named and left out. Raises UserError if nothing is left, or, with strict, if the runs cannot all
    stand in one table.
    """
    if evaluation is not None and "=" not in evaluation and (split is not None or dataset is not None):
        raise UserError("evaluation=NAME says the split and the corpus already: leave out split=... and dataset=...")
    chosen = choose(folders, Request(split, dataset, evaluation, every_cache))
    notes: list[str] = []
    tables = _tables(chosen.records, every_cache)
    if strict and chosen.lacking:
        raise UserError(
            f"{len(chosen.lacking)} runs lack the evaluation that the others have ({some_of(chosen.lacking)}): evaluate them "
            f"(python eval_model.py run=NAME), name the others alone, or leave out strict=true"
        )
    if len(tables) > 1:
        differing = ", ".join(_differing([table.conditions for table in tables]))
        if strict:
            raise UserError(
                f"the runs cannot stand in one table, they differ in {differing} "
                f"({'; '.join(table.heading for table in tables)}): name runs that agree, or leave out strict=true"
            )
        notes.append(f"separate tables, because these runs differ in {differing}")
    if every_cache:
        notes.append("x MHA: cache bytes per token of context, over those of MHA with the model's heads in bfloat16")
    notes = [*chosen.notes, *notes, *chosen.repeated, *_uneven_seeds(tables), *_circumstances(chosen.records)]
    return Comparison(tables, notes, chosen.lacking)


def _tables(records: Sequence[Mapping[str, Any]], every_cache: bool) -> list[ComparisonTable]:
    """Records with equal conditions share a table; the largest table comes first."""
    keys = [key for key in CONDITIONS if not (every_cache and key in CACHE)]
    groups = grouped(records, lambda record: values_at(record, keys))
    all_conditions = [dict(zip(keys, values, strict=True)) for values in groups]
    differing = _differing(all_conditions)
    # What is not the usual way of scoring is said even where all tables have it; older records do not know their stride.
    unusual = [key for key, usual in USUAL.items() for each in all_conditions if each.get(key) not in (None, usual)]
    shown = [key for key in keys if key in (*_IN_EVERY_HEADING, *differing, *unusual)]
    tables = []
    for conditions, members in zip(all_conditions, groups.values(), strict=True):
        heading, unsaid = _heading(conditions, shown), None
        quoted = {record["cache_dtype"] for record in members if not record["through_cache"]}
        if every_cache and len(quoted) == 1:
            unsaid = quoted.pop()
            heading += f", cache in {unsaid} where a row says nothing else"
        setups, caution = _with_intervals(_setups(members, every_cache, unsaid), members)
        tables.append(ComparisonTable(heading, conditions, setups, caution))
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
    groups = list(grouped(records, lambda record: values_at(record, _ONE_ROW)).values())
    names = _names([group[0] for group in groups])
    setups = []
    for group in groups:
        first = group[0]
        name, cache = names[first["setup_hash"]], _row_label(first, unsaid) if every_cache else ""
        per_token, mha = _bytes_per_context_token(first), first.get("mha_cache_bytes_per_token")
        means = {key: _mean(_values(group, key)) for key in _COMPARED}
        if every_cache:  # else of elements, whatever the dtype
            means["cache_ratio_to_mha"] = per_token / mha if mha else None
        taken_over = {field.name: first[field.name] for field in dataclasses.fields(Setup) if field.name in first}
        worked_out = {
            "variant": f"{name}, {cache}" if cache else name,
            "configuration": name,
            "cache": cache,
            "n": len(group),
            "seeds": sorted(record["seed"] for record in group),
            "means": means,
            "deviations": {key: _deviation(_values(group, key)) for key in SCORES},
            "bits_per_byte_half_width": None,
            "cache_bytes_per_context_token": per_token,
            "runs": [record["name"] for record in group],
        }
        setups.append(Setup(**taken_over | worked_out))
    return sorted(setups, key=lambda setup: setup.bits_per_byte)


def _with_intervals(setups: list[Setup], records: Sequence[Mapping[str, Any]]) -> tuple[list[Setup], str]:
    """The setups with an interval about each mean, and a sentence on what may be read from their order.

    One row a configuration: its other caches are the same weights, and would count one scatter twice.
    """
    if all(setup.n == 1 for setup in setups):
        return setups, (
            "one seed each: what another seed would change is not known, so the order may be chance; add seeds with "
            "python train_model.py -m seed=0,1,2"
            if len(setups) > 1
            else ""
        )
    from harness.study.statistics import can_be_compared, contrasts, mean_interval, residual_deviation, with_error

    seeds = {pair: number for number, pair in enumerate(sorted({values_at(record, SEEDS) for record in records}))}
    of_row = grouped(records, lambda record: values_at(record, _ONE_ROW))
    plainest_last = sorted(setups, key=lambda setup: (not setup.through_cache, setup.cache_bytes_per_context_token))
    plain = {setup.setup_hash: setup for setup in plainest_last}.values()
    values = {
        setup.variant: {
            seeds[values_at(record, SEEDS)]: record["bits_per_byte"] for record in of_row[values_at(vars(setup), _ONE_ROW)]
        }
        for setup in plain
    }
    lineages = _lineages(records, {setup.setup_hash: setup.variant for setup in plain})
    deviation, freedom = residual_deviation(values, lineages=lineages)
    if not deviation:
        return setups, "no interval: the seeds leave nothing that could be told from chance"
    means = {name: mean_interval(values, name, lineages=lineages) for name in values}
    setups = [
        dataclasses.replace(setup, bits_per_byte_half_width=(found.high - found.low) / 2)
        if (found := means.get(setup.variant)) and found.low is not None and found.high is not None
        else setup
        for setup in setups
    ]
    best, *others = [setup.variant for setup in setups if setup.variant in values]
    comparable = [(best, other) for other in others if can_be_compared(values, best, other, lineages)]
    alike = [found for found in contrasts(values, primary=[], other=comparable, lineages=lineages) if not found.resolved]
    said = (
        f"n = {span([setup.n for setup in setups])} seeds a row; ±: sample deviation; 95 %: of the mean, "
        f"the wider of one with the row's own scatter and one with that pooled over the rows ({deviation:.4f}, "
        f"{counted(freedom, 'degree')} of freedom)"
    )
    if freedom < 4:
        said += ", few, so the intervals are themselves uncertain"
    if alike:
        shown = ", ".join(
            f"{found.b} ({with_error(-found.difference, found.low, found.high, sign='+')})"
            for found in alike
            if found.low is not None and found.high is not None
        )
        said += f"; not told apart from {best}: {shown}"
    return setups, said


def _lineages(records: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> dict[str, str]:
    """For statistics.contrasts: which setups descend from runs of the same one, trained on or converted."""
    from harness.study.statistics import origins

    setups = {record["name"]: names[record["setup_hash"]] for record in records}
    found: dict[str, str] = {}
    for run, first in origins({record["name"]: _source(record) for record in records}).items():
        found.setdefault(setups[run], setups.get(first, first))
    return found


def _source(record: Mapping[str, Any]) -> str | None:
    """The name of the run whose weights a run began with."""
    place = record.get("init_from") or (record.get("origin") or {}).get("source")
    return None if place is None else Path(str(place)).name


def _values(records: Sequence[Mapping[str, Any]], key: str) -> list[Any]:
    """Of one of _COMPARED; none where a record lacks it."""
    values = [record.get(key) for record in records]
    return [] if None in values else values


def _mean(values: Sequence[Any]) -> Any:
    return (values[0] if len(set(values)) == 1 else statistics.fmean(values)) if values else None


def _deviation(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _bytes_per_context_token(record: Mapping[str, Any]) -> float:
    """Cache bytes at the context over its tokens; older records know no context, and no window that would evict."""
    if record["cache_bytes_at_context"] is None:
        return float(record["cache_bytes_per_token"])
    return float(record["cache_bytes_at_context"] / record["cache_context"])


def _row_label(record: Mapping[str, Any], unsaid: str | None) -> str:
    """What its cache keeps, and how it was scored where that does not say it; nothing for a plain evaluation in `unsaid`."""
    # What is in few bits eval_model.py never only quotes.
    implied = record["cache_window"] is not None or in_few_bits(record)
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
    # Runs of several folders may share even their full name.
    for longer in (_without_seeds, lambda record: record["name"], lambda record: f"{record['name']} {record['setup_hash']:.8}"):
        counts = Counter(names.values())
        names = {key: name if counts[name] == 1 else longer(setups[key]) for key, name in names.items()}
    return names


def _without_seeds(record: Mapping[str, Any]) -> str:
    """The run's own name without its seeds, and of a default one, dataset-model-attention-overrides, from the attention on."""
    name, seed = str(record["name"]), f"-seed{record['seed']}"
    both = f"{seed}-data{record['data_seed']}"
    name = name.removesuffix(both if name.endswith(both) else seed)
    return name.removeprefix(f"{record.get('trained_on') or record['dataset']}-{record['model']}-")


def _uneven_seeds(tables: Sequence[ComparisonTable]) -> list[str]:
    """A sentence for each configuration whose caches were not scored on the same seeds."""
    notes = []
    for table in tables:
        notes += [
            f"the caches of {name} were scored on different seeds: what lies between them is not only the cache"
            for name, setups in grouped(table.setups, lambda setup: setup.configuration).items()
            if any(setup.seeds != setups[0].seeds for setup in setups)
        ]
    return notes


def _circumstances(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for each circumstance in which the runs differ."""
    notes = []
    for key, consequence in _CIRCUMSTANCES.items():
        values = sorted({str(record.get(key)) for record in records})
        if len(values) > 1:
            notes.append(f"{key} differs ({'; '.join(values)}): {consequence}")
    return notes


def as_text(comparison: Comparison) -> str:
    """Aligned columns for a terminal."""
    lines = []
    for table in comparison.tables:
        lines += [visible(table.heading), "", *aligned(table.cells()), ""]
        lines += [f"caution: {visible(table.caution)}", ""] if table.caution else []
    return "\n".join(lines + [f"note: {visible(note)}" for note in comparison.notes])


def comparison_markdown(comparison: Comparison) -> str:
    """One section a table."""
    lines = []
    for table in comparison.tables:
        columns, *rows = table.cells()
        lines += [f"### {markdown(table.heading)}", "", markdown_row(columns)]
        lines.append(markdown_row(["---"] + ["---:"] * (len(columns) - 1)))
        lines += [markdown_row(row) for row in rows]
        lines += ["", *([markdown(table.caution), ""] if table.caution else [])]
    return "\n".join(lines + [f"- {markdown(note)}" for note in comparison.notes]) + "\n"


def plain_table(comparison: Comparison) -> tuple[list[str], list[list[Any]]]:
    """Column names and unrounded rows of all tables in one, each row with its conditions."""
    at = {f"cache_bytes_at_{context}": str(context) for context in CACHE_CONTEXTS}
    rows = []
    for table in comparison.tables:
        for setup in table.setups:
            values = setup.plain() | table.conditions
            sizes = values.pop("cache_bytes_by_context") or {}
            row = {key: value for key, value in values.items() if key not in CONDITIONS}
            row |= {name: sizes.get(context) for name, context in at.items()} | {key: values[key] for key in CONDITIONS}
            rows.append({key: " ".join(map(str, value)) if isinstance(value, list) else value for key, value in row.items()})
    columns, *lines = table_of(rows)
    return columns, lines


def scatter_points(table: ComparisonTable, figure: str) -> tuple[list[str], list[list[Any]]]:
    """Columns and a row a setup: what is pointed at in a chart of a figure against the cache's size."""
    rows = [[setup.variant, table.cache_size(setup), setup.means[figure], setup.n] for setup in table.setups]
    return ["variant", f"cache bytes per token{table.at_tokens}", figure, "seeds"], rows


def comparison_csv(comparison: Comparison) -> str:
    """`plain_table` as comma-separated values."""
    columns, rows = plain_table(comparison)
    return csv_text([columns, *rows])


def write_tables(comparison: Comparison, folder: Path) -> list[Path]:
    """comparison.md, comparison.csv and comparison.json in a folder."""
    tables = [vars(table) | {"setups": [setup.plain() for setup in table.setups]} for table in comparison.tables]
    contents = {
        "comparison.md": comparison_markdown(comparison),
        "comparison.csv": comparison_csv(comparison),
        "comparison.json": json.dumps(vars(comparison) | {"tables": tables}, indent=2) + "\n",
    }
    for name, text in contents.items():
        write_text(folder / name, text)
    return [folder / name for name in contents]
