"""Which runs a comparison is made of, and which evaluation of each."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from harness.config.run_config import run_folders
from harness.errors import UserError, readable
from harness.evaluation.metric import Scores
from harness.files.text import counted, some_of
from harness.runs.evaluations import by_preference, common_kind
from harness.runs.kind import CACHE, PLAIN_CACHE, Kind, kind_of
from harness.runs.records import Evaluation, RunSummary, read_evaluations, read_summary

_Item = TypeVar("_Item")
_Key = TypeVar("_Key", bound=Hashable)
# Runs that agree in these can be scored on the same text and stand in one table.
_SAME_TRAINING = ("dataset", "data_fingerprint", "tokenizer_fingerprint", "tokens")
SEEDS = ("seed", "data_seed")  # of a run: one block of the comparison, whichever of the two differs
_OF_TRAINING = ("device", "torch", "commit")  # of an evaluation they are the training's too
# What records lack that were written before evaluations through a cache.
_FORMERLY = PLAIN_CACHE | {"cache_context": None, "cache_bytes_at_context": None, "cache_bytes_by_context": None}
_NAMES = ("name", "attention", "model", "seed", "data_seed", "setup_hash")
_FIGURES = ("parameters", "loss", "perplexity", "bits_per_byte", "cache_bytes_per_token", "tokens_per_second")
_NEEDED = (*_NAMES, *_SAME_TRAINING, "split", "cache_dtype", *_FIGURES)


@dataclass(frozen=True)
class _Run:
    folder: Path
    summary: Evaluation  # stands for an evaluation where there is none
    evaluations: list[Evaluation]  # the newest last; "record" is each one's name


def _expanded(folders: Sequence[Path]) -> list[Path]:
    """Every run once, in the order given; a folder of runs stands for all of them."""
    found: dict[Path, Path] = {}
    for folder in folders:
        with readable(str(folder), "make it readable, or leave it out"):
            inside = [folder] if _is_run(folder) else [path for path in run_folders(folder) if _is_run(path)]
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
        summary = _completed(read_summary(folder), folder / "summary.json")
        missing = [key for key in _NEEDED if key not in summary]
        if missing:
            notes.append(f"left out: the summary.json of {folder.name} has no {', '.join(missing)}")
            continue
        evaluations = [
            _completed(record, folder / "evaluations" / f"{record['record']}.json") for record in read_evaluations(folder)
        ]
        runs.append(_Run(folder, summary, evaluations))
    if not runs:
        raise UserError(f"no run to compare ({'; '.join(notes)}); train one with: python train_model.py attention=mla")
    return runs, notes


def _completed(record: Evaluation | RunSummary, file: Path) -> Evaluation:
    """Of whatever version. Raises UserError where its figures do not fit together."""
    record = cast(Evaluation, _FORMERLY | record)
    if (record["cache_context"] is None) is not (record["cache_bytes_at_context"] is None):
        raise UserError(
            f"{file} has only one of cache_context and cache_bytes_at_context, which say one size together: delete it and run "
            f"the command that wrote it again"
        )
    return record


@dataclass(frozen=True)
class Request:
    """Which evaluation of each run to compare, as `compare` is asked for it."""

    split: str | None
    dataset: str | None
    evaluation: str | None
    every_cache: bool

    @property
    def wanted(self) -> str:
        return self.split or "test"

    def of(self, run: _Run) -> list[Evaluation]:
        """The run's evaluations on a whole split of the named corpus or of its own; the one of that name; those on such a
        split, whole or not, that were made with an option."""
        key, equals, value = (self.evaluation or "").partition("=")
        if self.evaluation is not None and not equals:
            return [record for record in run.evaluations if record["record"] == self.evaluation]
        corpus, which = ("dataset", self.dataset) if self.dataset else ("data_fingerprint", run.summary["data_fingerprint"])
        return [
            record
            for record in run.evaluations
            if record.get("split") == self.wanted
            and (str(record.get(key)).lower() == value.lower() if equals else kind_of(record).max_tokens is None)
            and record.get(corpus) == which
        ]

    def command(self, runs: Sequence[_Run], kind: Kind | None) -> str:
        """What makes the evaluation that these runs lack, for a shell: a command for each folder of runs."""
        options: dict[str, Any] = {"split": self.wanted, "dataset": self.dataset}
        if kind is not None:
            options |= {
                "per_document": "true" if kind.per_document else None,
                "stride_fraction": None if kind.has_usual_stride else kind.stride_fraction,
                "cache.dtype": None if kind.cache_dtype == "bfloat16" else kind.cache_dtype,
                "cache.window": kind.cache_window,
                "cache.sinks": kind.cache_sinks or None,
            }
        shown = [f"{key}={value}" for key, value in options.items() if value is not None]
        commands = []
        for place, inside in sorted(grouped(runs, lambda run: run.folder.parent).items()):
            runs_dir = [f"runs_dir={place}"] if len(inside) > 1 and place != Path.cwd() / "runs" else []
            which = f"run={inside[0].folder if len(inside) == 1 else 'all'}"
            commands.append(shlex.join(["python", "eval_model.py", which, *shown, *runs_dir]))
        return " && ".join(commands)

    def nothing_found(self, runs: Sequence[_Run]) -> UserError:
        others = some_of(_other_evaluations(runs, set()))
        if self.evaluation is not None:
            known = others or "none; make one with: python eval_model.py run=all"
            return UserError(f"no run has an evaluation={self.evaluation}; there are: {known}")
        on = f"split={self.wanted}" + (f" of dataset={self.dataset}" if self.dataset else "")
        return UserError(
            f"none of {len(runs)} runs has an evaluation on the whole of {on}, the first is {runs[0].folder.name}; make it "
            f"with: {self.command(runs, None)}" + (f"; evaluation=NAME takes of {others}" if others else "")
        )


@dataclass(frozen=True)
class Chosen:
    """What is compared, and sentences on what is not."""

    records: list[Evaluation]  # one a run, all of one kind of evaluation in a group, or one a run and cache
    lacking: list[str]  # names of the runs that have no such evaluation
    notes: list[str]
    repeated: list[str]  # on runs that are no second sample


def choose(folders: Sequence[Path], request: Request) -> Chosen:
    """Of runs, or of folders of runs.

    Raises UserError when no run has the evaluation asked for, or, asked for by split or name, a group has none.
    """
    finished, left_out = _finished_runs(_expanded(folders))
    runs, repeated = _without_repeats(finished)
    records: list[Evaluation] = []
    scored: set[str] = set()
    validated: list[_Run] = []
    lacking: list[tuple[str, list[_Run]]] = []
    asks_for_none = request.evaluation is None and request.dataset is None and request.split in (None, "validation")
    for group in grouped(runs, lambda run: values_at(run.summary, _SAME_TRAINING)).values():
        found = [request.of(run) for run in group]
        kind = common_kind(found)
        if kind is None and asks_for_none:
            validated += group
            records += [run.summary for run in group]
            continue
        absent = []
        for run, pool in zip(group, by_preference(found), strict=True):
            if not pool or kind_of(pool[-1]) != kind:
                absent.append(run)
                continue
            scored.add(pool[-1]["record"])
            kept = {key: run.summary.get(key) for key in ("name", *_OF_TRAINING)}
            # A score that an older record lacks is not the training's, which is of the validation split.
            trained = {key: value for key, value in run.summary.items() if key not in Scores.__annotations__}
            rows = _on_every_cache(run, pool[-1]) if request.every_cache else pool[-1:]
            records += [cast(Evaluation, trained | record | kept) for record in rows]
        if absent:
            lacking.append((request.command(absent, kind), absent))
    if not records:
        raise request.nothing_found(runs)
    notes = []
    if scored:
        asked = f"evaluation={request.evaluation}" if request.evaluation else f"the {request.wanted} split"
        notes.append(f"figures of eval_model.py on {asked}")
    if validated:
        remedy = " (for the test split first run: python eval_model.py run=all)" if request.split is None else ""
        which = "" if len(validated) == len(runs) else f", of {some_of([run.folder.name for run in validated])}"
        notes.append(f"final validation figures of each run{which}{remedy}")
    notes += [
        f"without this evaluation, so in no table: {some_of([run.folder.name for run in absent])}"
        + (f"; make it with: {command}" if request.evaluation is None else "")
        for command, absent in lacking
    ]
    others = _other_evaluations(runs, {record.get("record") for record in records})
    if others and request.evaluation is None:
        notes.append(f"other evaluations of these runs, shown with evaluation=NAME or =max_tokens=N: {some_of(others)}")
    return Chosen(records, [run.folder.name for _, absent in lacking for run in absent], notes + left_out, repeated)


def _on_every_cache(run: _Run, chosen: Evaluation) -> list[Evaluation]:
    """The newest evaluation of each cache that differs from the chosen one in nothing else."""
    alike = ("split", "data_fingerprint", "precision")
    newest = {
        values_at(record, CACHE): record
        for record in run.evaluations
        if values_at(record, alike) == values_at(chosen, alike) and kind_of(record).protocol == kind_of(chosen).protocol
    }
    return list(newest.values())


def _other_evaluations(runs: Sequence[_Run], shown: set[Any]) -> list[str]:
    """Names of what else was evaluated, with the runs that have it and how many tokens it scored."""
    records = [record for run in runs for record in run.evaluations if record["record"] not in shown]
    return [
        f"{name} ({same[0].get('evaluated_tokens') or 0:,} tokens, {counted(len(same), 'run')})"
        for name, same in sorted(grouped(records, lambda record: record["record"]).items())
    ]


def grouped(items: Iterable[_Item], key: Callable[[_Item], _Key]) -> dict[_Key, list[_Item]]:
    """Items of one key together, in the order in which the keys come."""
    groups: dict[_Key, list[_Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def values_at(record: Mapping[str, Any], keys: Sequence[str]) -> tuple[Any, ...]:
    return tuple(record.get(key) for key in keys)


def _without_repeats(runs: Sequence[_Run]) -> tuple[list[_Run], list[str]]:
    """One run for each setup and seed: two runs of one seed say nothing about the spread over seeds."""
    kept: dict[tuple[Any, ...], _Run] = {}
    notes = []
    for run in runs:
        first = kept.setdefault(values_at(run.summary, ("setup_hash", *SEEDS)), run)
        if first is not run:
            name, other = run.summary["name"], first.summary["name"]
            notes.append(f"left out: {name} repeats {other}, setup and seed are the same")
    return list(kept.values()), notes
