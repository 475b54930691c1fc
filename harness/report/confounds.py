"""What differs between the arms besides what is compared: quantities that a fair comparison would have equal, and fields."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from harness.config.identity import flat
from harness.report.document import at_contexts
from harness.runs.kind import PROTOCOL
from harness.runs.provenance import short_commit
from harness.study.results import RunResult

Runs = Mapping[str, Sequence[RunResult]]  # the finished ones, by arm

# Fields of a configuration that say where and for whom a run is, not what it is.
NOT_COMPARED = ("name", "runs_dir", "data_dir", "seed", "data_seed", "overwrite", "tracking", "intervals")


@dataclass(frozen=True)
class Fact:
    """One line of the confound table."""

    name: str
    values: dict[str, str]  # arm -> text
    equal: bool
    spread: float | None = None  # largest / smallest - 1, of numbers
    is_number: bool = False


def tested(run: RunResult) -> Mapping[str, Any]:
    """The record of the evaluation on the test split, which the run has."""
    record = run.evaluation()
    assert record is not None
    return record


def protocol(run: RunResult) -> str:
    """How the test split was scored: figures of different protocols are no figures of one thing."""
    record = tested(run)
    return ", ".join(f"{name}={record.get(name)}" for name in reversed(PROTOCOL))  # as in the pages that are published


_CACHE = "cache bytes per token"
_BY_SEED = "seed: order of the data"  # differs from run to run of an arm by design
_QUANTITIES: dict[str, Callable[[RunResult], Any]] = {
    "training FLOPs per token": lambda run: run.summary["training_flops_per_token"],
    _CACHE: lambda run: run.summary["cache_bytes_per_token"],
    "cache dtype": lambda run: run.summary["cache_dtype"],
    "training tokens": lambda run: run.summary["tokens"],
    "tokens before, of the run it starts from": lambda run: run.summary.get("initial_tokens", 0),
    "training tokens per parameter": lambda run: run.summary["tokens"] / run.summary["parameters"],
    "training data": lambda run: f"{run.summary['dataset']} {run.summary['data_fingerprint'][:12]}",
    "tokenizer": lambda run: str(run.summary["tokenizer_fingerprint"] or "bytes")[:12],
    "test data": lambda run: tested(run)["data_fingerprint"][:12],
    "test tokens": lambda run: tested(run)["evaluated_tokens"],
    "how the test split was scored": protocol,
    _BY_SEED: lambda run: f"{run.seed}: {run.summary['data_seed']}",
    "learning rate": lambda run: f"{run.lr:g}",
    "attention kernel that ran": lambda run: run.summary["kernel"],
    "precision": lambda run: run.summary["precision"],
    "compiled": lambda run: "yes" if run.summary["compiled"] else "no",
    "hardware": lambda run: run.summary["device"],
    "torch": lambda run: run.summary["torch"],
    "commit": lambda run: short_commit(run.summary["commit"]),
}


def facts(runs: Runs) -> list[Fact]:
    """Quantities that a fair comparison would have equal, equal or not."""
    found = [_fact("parameters", runs, lambda run: run.summary["parameters"])]
    blocks = [run.summary["parameters_by_block"] for of_arm in runs.values() for run in of_arm[:1]]
    for block in dict.fromkeys(name for sizes in blocks for name in sizes if name != "total"):
        if any(sizes.get(block) for sizes in blocks):
            found.append(_fact(f"parameters: {block}", runs, _parameters_of(block)))
    found += [_fact(name, runs, of) for name, of in _QUANTITIES.items()]
    return [_of_contexts(fact, runs) if fact.name == _CACHE else fact for fact in found]


def _of_contexts(cache: Fact, runs: Runs) -> Fact:
    contexts = [of_arm[0].summary.get("cache_context") for of_arm in runs.values()]
    name, texts = at_contexts(cache.name, [*cache.values.values()], contexts)
    return replace(cache, name=name, values=dict(zip(runs, texts, strict=True)))


def _fact(name: str, runs: Runs, of: Callable[[RunResult], Any]) -> Fact:
    """Runs of one arm that differ are a difference too."""
    values = {arm: list(dict.fromkeys(of(run) for run in of_arm)) for arm, of_arm in runs.items()}
    flat = {value for found in values.values() for value in found}
    if not all(isinstance(value, (int, float)) for value in flat):
        texts = {arm: ", ".join(map(str, found)) for arm, found in values.items()}
        return Fact(name, texts, len(set(texts.values()) if name == _BY_SEED else flat) == 1)
    texts = {arm: " / ".join(map(_number, sorted(found))) for arm, found in values.items()}
    spread = max(flat) / min(flat) - 1 if min(flat) > 0 else None
    return Fact(name, texts, len(flat) == 1, spread, is_number=True)


def _parameters_of(block: str) -> Callable[[RunResult], int]:
    return lambda run: run.summary["parameters_by_block"].get(block, 0)


def _number(number: float) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:,.3g}"


def differing_fields(runs: Runs) -> list[Fact]:
    """Fields of config.yaml in which the arms differ."""
    compared = {
        arm: flat({key: value for key, value in of_arm[0].config.items() if key not in NOT_COMPARED})
        for arm, of_arm in runs.items()
    }
    found = []
    for name in dict.fromkeys(name for fields in compared.values() for name in fields):
        given = {arm: fields.get(name, {}) for arm, fields in compared.items()}  # an empty group has no fields
        values = {arm: "–" if value == {} else "none" if value is None else str(value) for arm, value in given.items()}
        if len(set(values.values())) > 1:
            found.append(Fact(name, values, False))
    return found
