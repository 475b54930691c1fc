"""What a study's runs say, as numbers: verdicts, series for the figures, the differences between arms that are no finding.

An arm without finished runs, a figure that some runs lack, a comparison that cannot be made yet: each is left out and
named in the notes. Nothing is filled in.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from harness.errors import UserError
from harness.study.results import ArmInfo, RunResult, StudyResults
from harness.study.statistics import (
    Contrast,
    Mean,
    Noise,
    Values,
    bootstrap,
    contrasts,
    mean_interval,
    pareto_front,
    residual_deviation,
    without,
)
from harness.study.tuning import Optimum, as_named, optimum, parabola

UNITS = {"bits_per_byte": "bits per byte", "loss": "nats per token", "perplexity": "perplexity"}
# Fields of a configuration that say where and for whom a run is, not what it is.
NOT_COMPARED = ("name", "runs_dir", "data_dir", "seed", "data_seed", "overwrite", "tracking", "intervals")
CURVE_POINTS = 60  # of a curve, at most


@dataclass(frozen=True)
class Arm:
    """An arm and its finished, evaluated runs."""

    info: ArmInfo
    runs: list[RunResult]  # by seed, those with a test evaluation; none: nothing has finished
    mean: Mean | None  # of the study's metric on the test split

    @property
    def name(self) -> str:
        return self.info.name

    def summary(self, key: str) -> Any:
        """A figure of the summary that all seeds share; None without a run."""
        return self.runs[0].summary[key] if self.runs else None

    def test(self, key: str) -> float | None:
        """Mean over the seeds of a figure of the test evaluation."""
        return statistics.fmean(float(_tested(run)[key]) for run in self.runs) if self.runs else None


@dataclass(frozen=True)
class Verdict:
    """A comparison, and what another sample of test text would have done to it."""

    contrast: Contrast
    sentence: str
    noise: Noise | None  # bits per byte, of the losses averaged over `noise_seeds`
    noise_seeds: list[int]
    no_noise: str | None  # why there is none


@dataclass(frozen=True)
class CurvePoint:
    """The mean over seeds at one place, and the lowest and highest seed."""

    x: float
    mean: float
    low: float
    high: float
    n: int


Curves = dict[str, list[CurvePoint]]  # by arm


@dataclass(frozen=True)
class Sweep:
    """One arm's learning rates at one budget."""

    arm: str
    tokens: int
    losses: dict[float, float]  # rate -> validation loss
    best: Optimum | None  # None: fewer than three rates
    chosen: float | None  # what the main runs took

    def parabola(self, points: int = 33) -> list[tuple[float, float]]:
        """Through the lowest and its neighbours, in log(rate); none where the lowest is at an edge."""
        curve = parabola(self.losses)
        if curve is None:
            return []
        first, last = curve.x[0], curve.x[-1]
        grid = [first + (last - first) * step / (points - 1) for step in range(points)]
        return [(math.exp(x), curve.at(x)) for x in grid]


@dataclass(frozen=True)
class SharedRate:
    """The arms at one learning rate for all, each at its whole budget."""

    lr: float
    values: dict[str, dict[int, float]]  # arm -> seed -> the metric on the test split
    means: dict[str, Mean]
    verdicts: list[Contrast]  # the declared pairs, not part of the declared family


@dataclass(frozen=True)
class Fact:
    """One line of the confound table."""

    name: str
    values: dict[str, str]  # arm -> text
    equal: bool
    spread: float | None = None  # largest / smallest - 1, of numbers


@dataclass(frozen=True)
class Findings:
    """All that is reported."""

    results: StudyResults
    unit: str
    arms: list[Arm]
    baseline: str | None  # whose curves the others' are subtracted from
    declared: list[Verdict]
    looked_at: list[Verdict]  # neither declared nor corrected
    sigma: float | None  # pooled
    dof: int
    front: list[str]
    decode: list[dict[str, Any]]  # the fastest path of each arm, context and batch
    curves: Curves
    curve_unit: str
    curve_gaps: Curves  # minus the baseline's of the same seed
    positions: Curves  # test loss in nats by context tokens
    position_gaps: Curves
    beyond: Curves  # loss on the same targets by context, from half the training length on
    training_length: int | None
    staircase: list[tuple[str, Verdict | None]]  # an arm and the step to it
    sweeps: list[Sweep]
    shared: SharedRate | None
    extras: dict[str, dict[str, dict[str, Mean]]]  # extra -> arm -> figure -> mean over seeds
    facts: list[Fact]
    fields: list[Fact]  # of the configurations, those that differ
    notes: list[str]  # what is missing or went wrong

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)


def find(results: StudyResults) -> Findings:
    """Work everything out. Raises UserError when no run has finished."""
    values = results.values()
    if not values:
        raise UserError(
            f"{results.folder} holds no finished and evaluated run yet, so there is nothing to report: let "
            f"{results.command or 'python scripts/run_study.py'} end"
        )
    apart = [info.name for info in results.arms if info.converted]
    pooled = without(values, apart) or values
    arms = [
        Arm(
            info,
            sorted(
                (run for run in results.runs if run.arm == info.name and run.evaluation()), key=lambda run: run.seed
            ),
            _mean(values, pooled, info.name),
        )
        for info in results.arms
    ]
    done = [arm for arm in arms if arm.runs]
    unit = UNITS[results.metric]
    notes = _notes(results, arms)
    baseline = next((arm.name for arm in done if arm.info.reference), done[0].name) if len(done) > 1 else None
    declared, others, lacking = _pairs(results, values, baseline)
    notes += lacking
    found = contrasts(values, primary=declared, other=others, apart=apart)
    by_arm = {arm.name: arm for arm in arms}
    verdicts = [_verdict(contrast, by_arm, unit) for contrast in found]
    sigma, dof = residual_deviation(pooled)
    positions, beyond = _by_context(done)
    curve_key = "val/loss" if len({arm.summary("tokenizer_fingerprint") for arm in done}) == 1 else "val/bits_per_byte"
    curves = {arm.name: [_curve(run, curve_key) for run in arm.runs] for arm in done}
    return Findings(
        results=results, unit=unit, arms=arms, baseline=baseline,
        declared=[verdict for verdict in verdicts if verdict.contrast.primary],
        looked_at=[verdict for verdict in verdicts if not verdict.contrast.primary],
        sigma=sigma, dof=dof,
        front=pareto_front([
            (arm.name, float(arm.summary("cache_bytes_per_token")), arm.mean.mean) for arm in done if arm.mean
        ]),
        decode=_fastest(results, {arm.name for arm in done}),
        curves={name: _over_seeds(of_seeds) for name, of_seeds in curves.items()},
        curve_unit="nats per token" if curve_key == "val/loss" else "bits per byte",
        curve_gaps=_gaps(done, curves, baseline),
        positions={name: _over_seeds(of_seeds) for name, of_seeds in positions.items()},
        position_gaps=_gaps(done, positions, baseline),
        beyond={name: _over_seeds(of_seeds) for name, of_seeds in beyond.items()},
        training_length=_only(arm.runs[0].config["model"]["max_seq_len"] for arm in done),
        staircase=_staircase(results, verdicts, values),
        sweeps=_sweeps(results),
        shared=_shared(results, declared),
        extras=_extras(done),
        facts=_facts(done), fields=_differing_fields(done), notes=notes,
    )  # fmt: skip


def _tested(run: RunResult) -> dict[str, Any]:
    record = run.evaluation()
    assert record is not None
    return record


def _protocol(run: RunResult) -> str:
    """How the test split was scored: figures of different protocols are no figures of one thing."""
    record = _tested(run)
    fields = ("max_tokens", "stride_fraction", "per_document")
    return ", ".join(f"{name}={record.get(name)}" for name in fields)


def _only(values: Iterable[Any]) -> Any:
    """The one value that all share, else None."""
    different = set(values)
    return different.pop() if len(different) == 1 else None


# --- what is missing -------------------------------------------------------------------------------------------------


def _notes(results: StudyResults, arms: Sequence[Arm]) -> list[str]:
    notes = []
    if results.missing:
        total = len(results.runs) + results.missing
        notes.append(
            f"{results.missing} of {total} runs are not finished: this is a report of the other {len(results.runs)}"
        )
    if unfinished := [arm.name for arm in arms if not arm.runs]:
        notes.append(f"no finished run of {', '.join(unfinished)}")
    if unscored := [run.folder.name for run in results.runs if run.evaluation() is None]:
        notes.append(f"not evaluated on the test split, so left out: {', '.join(unscored)}")
    protocols: dict[str, list[str]] = {}
    for run in (run for arm in arms for run in arm.runs):
        protocols.setdefault(_protocol(run), []).append(run.folder.name)
    if len(protocols) > 1:
        usual = max(protocols, key=lambda protocol: len(protocols[protocol]))
        others = "; ".join(f"{', '.join(runs)} ({how})" for how, runs in protocols.items() if how != usual)
        notes.append(
            f"the test split was not scored alike in all runs, so the comparisons below do not hold: most with {usual}, "
            f"but {others}; score these again with eval_model.py as the others were"
        )
    counts = {len(arm.runs) for arm in arms if arm.runs}
    if len(counts) > 1:
        notes.append(
            "the arms have different numbers of seeds: " + ", ".join(f"{a.name} {len(a.runs)}" for a in arms if a.runs)
        )
    for arm in arms:
        if len({run.summary["setup_hash"] for run in arm.runs}) > 1:
            notes.append(f"the runs of {arm.name} differ in more than their seed: they are no repetitions of one setup")
    return notes


# --- comparisons -----------------------------------------------------------------------------------------------------


def _pairs(
    results: StudyResults, values: Values, baseline: str | None
) -> tuple[list[tuple[str, str]], list[tuple[str, str]], list[str]]:
    """Declared pairs that can be compared, others worth a look, and notes on those that cannot be."""
    declared, notes = [], []
    for a, b in results.contrasts:
        if absent := [arm for arm in (a, b) if arm not in values]:
            notes.append(
                f"the declared comparison of {a} with {b} cannot be made yet: no run of {' and '.join(absent)}"
            )
        elif not values[a].keys() & values[b].keys():
            notes.append(f"the declared comparison of {a} with {b} cannot be made yet: they have no seed in common")
        else:
            declared.append((a, b))
    steps = list(zip((results.staircase or [])[1:], results.staircase or [], strict=False))
    others = steps or ([(arm, baseline) for arm in values if baseline and not declared])
    taken = {frozenset(pair) for pair in declared}
    others = [
        (a, b) for a, b in others
        if frozenset((a, b)) not in taken and a != b and a in values and b in values and values[a].keys() & values[b].keys()
    ]  # fmt: skip
    return declared, others, notes


def _verdict(contrast: Contrast, arms: Mapping[str, Arm], unit: str) -> Verdict:
    noise, seeds, why = _noise(arms[contrast.a], arms[contrast.b])
    return Verdict(contrast, contrast.sentence(unit), noise, seeds, why)


def _noise(a: Arm, b: Arm) -> tuple[Noise | None, list[int], str | None]:
    """The bootstrap of two arms over segments of the test split, of losses averaged over the seeds both have."""
    of_a, of_b = ({run.seed: run.segments() for run in arm.runs} for arm in (a, b))
    seeds = [seed for seed in of_a if of_a[seed] is not None and of_b.get(seed) is not None]
    if not seeds:
        return None, [], "no segment losses are stored for a common seed"
    found = [(of_a[seed], of_b[seed]) for seed in seeds]
    sizes = [segments["bytes"] for pair in found for segments in pair if segments is not None]
    if any(size != sizes[0] for size in sizes):
        return None, [], "their segments are cut differently"
    nats_a, nats_b = (
        np.mean([pair[which]["nats"] for pair in found], axis=0)  # type: ignore[index]
        for which in (0, 1)
    )
    try:
        return bootstrap(nats_a, nats_b, sizes[0]), seeds, None
    except UserError as error:
        return None, [], str(error).partition(":")[0]


def _staircase(results: StudyResults, verdicts: Sequence[Verdict], values: Values) -> list[tuple[str, Verdict | None]]:
    """The finished arms in the order of their changes. A step over an unfinished arm has no verdict."""
    by_pair = {(verdict.contrast.a, verdict.contrast.b): verdict for verdict in verdicts}
    steps: list[tuple[str, Verdict | None]] = []
    for before, arm in zip([None, *(results.staircase or [])], results.staircase or [], strict=False):
        if arm in values:
            steps.append((arm, by_pair.get((arm, before)) if before is not None else None))
    return steps if len(steps) > 1 else []


# --- series ----------------------------------------------------------------------------------------------------------


def _mean(values: Values, pooled: Values, arm: str) -> Mean | None:
    """Of an arm that shares the others' variance with their error bar; of one that does not, the plain mean."""
    if arm not in values:
        return None
    return mean_interval(pooled, arm) if arm in pooled else mean_interval({arm: values[arm]}, arm)


def _curve(run: RunResult, key: str) -> dict[float, float]:
    """tokens -> value; those that the weights had seen before count too."""
    before = run.summary.get("initial_tokens", 0)
    return {float(line["tokens"] + before): float(line[key]) for line in run.metrics if key in line}


def _over_seeds(curves: Sequence[Mapping[float, float]]) -> list[CurvePoint]:
    """At the places that every seed has, thinned out evenly, the last one kept."""
    common = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    step = max(1, math.ceil(len(common) / CURVE_POINTS))
    kept = common[::-1][::step][::-1]
    points = []
    for x in kept:
        values = [curve[x] for curve in curves]
        points.append(CurvePoint(x, statistics.fmean(values), min(values), max(values), len(values)))
    return points


def _gaps(arms: Sequence[Arm], curves: Mapping[str, Sequence[Mapping[float, float]]], baseline: str | None) -> Curves:
    """Differences from the baseline's curve of the same seed."""
    if baseline is None or baseline not in curves:
        return {}
    seeds = {arm.name: [run.seed for run in arm.runs] for arm in arms}
    reference = dict(zip(seeds[baseline], curves[baseline], strict=False))
    gaps: Curves = {}
    for arm, of_seeds in curves.items():
        pairs = [(curve, reference[s]) for s, curve in zip(seeds[arm], of_seeds, strict=False) if s in reference]
        points = _over_seeds([{x: c[x] - r[x] for x in c if x in r} for c, r in pairs])
        if arm != baseline and points:
            gaps[arm] = points
    return gaps


def _by_context(arms: Sequence[Arm]) -> tuple[dict[str, list[dict[float, float]]], dict[str, list[dict[float, float]]]]:
    """Per arm and seed: loss by context tokens within the training length, and on the same targets beyond it.

    A bin of contexts stands at its geometric middle. Arms in which one seed lacks the figures are left out.
    """
    within: dict[str, list[dict[float, float]]] = {}
    beyond: dict[str, list[dict[float, float]]] = {}
    for arm in arms:
        records = [_tested(run) for run in arm.runs]
        if all(record.get("loss_by_position") for record in records):
            within[arm.name] = [
                {math.sqrt(low * high): loss for low, high, loss in record["loss_by_position"] if loss is not None}
                for record in records
            ]
        extras = [(record.get("extras") or {}).get("beyond") for record in records]
        if all(extras):
            beyond[arm.name] = [
                {math.sqrt(entry["low"] * entry["high"]): entry["loss"] for entry in extra["bins"]}
                for extra in extras
                if extra
            ]
    return within, beyond


def _fastest(results: StudyResults, arms: set[str]) -> list[dict[str, Any]]:
    """Of several paths that decode the same the fastest, as a user would choose."""
    best: dict[tuple[str, int, int], dict[str, Any]] = {}
    for row in results.decode or []:
        key = (row["arm"], row["context"], row["batch"])
        if row["arm"] in arms and (key not in best or row["milliseconds"] < best[key]["milliseconds"]):
            best[key] = row
    return list(best.values())


# --- learning rates --------------------------------------------------------------------------------------------------


def _sweeps(results: StudyResults) -> list[Sweep]:
    """Every arm's at every budget that was swept, in the order of the arms."""
    losses: dict[tuple[str, int], dict[float, float]] = {}
    for run in results.sweep:
        losses.setdefault((run.arm, run.summary["tokens"]), {})[run.lr] = run.summary["loss"]
    order = [arm.name for arm in results.arms]
    return [
        Sweep(arm, tokens, found, optimum(found) if len(found) > 2 else None, results.chosen_lr.get(arm))
        for (arm, tokens), found in sorted(losses.items(), key=lambda item: (order.index(item[0][0]), item[0][1]))
        if len(found) > 1
    ]  # fmt: skip


def _shared(results: StudyResults, declared: Sequence[tuple[str, str]]) -> SharedRate | None:
    """Runs of the sweep and of the study at the shared rate, if they had the study's whole budget."""
    if not results.chosen_lr or results.shared_lr is None:
        return None
    lr = as_named(results.shared_lr)
    budget = {run.arm: run.summary["tokens"] for run in results.runs}
    values: dict[str, dict[int, float]] = {}
    for run in [*results.sweep, *results.runs]:
        record = run.evaluation()
        if record is not None and math.isclose(run.lr, lr) and run.summary["tokens"] == budget.get(run.arm):
            values.setdefault(run.arm, {})[run.seed] = float(record[results.metric])
    if len(values) < 2:
        return None
    ordered = {arm.name: values[arm.name] for arm in results.arms if arm.name in values}
    pairs = [(a, b) for a, b in declared if a in values and b in values and values[a].keys() & values[b].keys()]
    means = {arm: mean_interval(ordered, arm) for arm in ordered}
    return SharedRate(lr, ordered, means, contrasts(ordered, primary=(), other=pairs))


# --- extras ----------------------------------------------------------------------------------------------------------


def _extras(arms: Sequence[Arm]) -> dict[str, dict[str, dict[str, Mean]]]:
    """The plain numbers of each extra, over the seeds that have them."""
    found: dict[str, dict[str, dict[str, dict[int, float]]]] = {}  # extra -> figure -> arm -> seed -> value
    for arm in arms:
        for run in arm.runs:
            for extra, figures in (_tested(run).get("extras") or {}).items():
                plain = _recall(figures or {}) if extra == "recall" else figures or {}
                for figure, value in plain.items():
                    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
                        by_arm = found.setdefault(extra, {}).setdefault(figure, {})
                        by_arm.setdefault(arm.name, {})[run.seed] = float(value)
    tables: dict[str, dict[str, dict[str, Mean]]] = {}
    for extra, by_figure in found.items():
        for figure, values in by_figure.items():
            for name in values:
                tables.setdefault(extra, {}).setdefault(name, {})[figure] = mean_interval(values, name)
    return tables


def _recall(figures: Mapping[str, Any]) -> dict[str, float]:
    """The few numbers of harness/evaluation/recall.py that arms are compared by, under names for people."""
    found: dict[str, float] = {}
    for task in ("passkey", "copying"):
        for entry in figures.get(task) or []:
            found[f"{task} in {entry['length']}: share right"] = entry["accuracy"]
            found[f"{task} in {entry['length']}: nats gained"] = entry["gain"]
    if answers := figures.get("answers"):
        found["answers: share right"] = answers["accuracy"]
        found["answers: share by guessing"] = answers["chance"]
        if answers.get("newest") is not None:  # what a model gets right that always says the newest value
            found["answers: share by saying the newest value"] = answers["newest"]
        found |= {f"answers of {entry['pairs']} pairs: share right": entry["accuracy"] for entry in answers["by_pairs"]}
    return found


# --- what else differs between the arms ------------------------------------------------------------------------------


def _facts(arms: Sequence[Arm]) -> list[Fact]:
    """Quantities that a fair comparison would have equal, equal or not."""
    facts = [_number_fact("parameters", arms, lambda run: run.summary["parameters"])]
    blocks = dict.fromkeys(block for arm in arms for block in arm.runs[0].summary["parameters_by_block"])
    for block in blocks:
        if block != "total" and any(arm.runs[0].summary["parameters_by_block"].get(block) for arm in arms):
            facts.append(_number_fact(f"parameters: {block}", arms, _parameters_of(block)))
    facts += [
        _number_fact("training FLOPs per token", arms, lambda run: run.summary["training_flops_per_token"]),
        _number_fact("cache bytes per token", arms, lambda run: run.summary["cache_bytes_per_token"]),
        _text_fact("cache dtype", arms, lambda run: run.summary["cache_dtype"]),
        _number_fact("training tokens", arms, lambda run: run.summary["tokens"]),
        _number_fact("tokens before, of the run it starts from", arms, lambda run: run.summary.get("initial_tokens", 0)),
        _number_fact("training tokens per parameter", arms, lambda run: run.summary["tokens"] / run.summary["parameters"]),
        _text_fact("training data", arms, lambda run: f"{run.summary['dataset']} {run.summary['data_fingerprint'][:12]}"),
        _text_fact("tokenizer", arms, lambda run: str(run.summary["tokenizer_fingerprint"] or "bytes")[:12]),
        _text_fact("test data", arms, lambda run: _tested(run)["data_fingerprint"][:12]),
        _number_fact("test tokens", arms, lambda run: _tested(run)["evaluated_tokens"]),
        _text_fact("how the test split was scored", arms, _protocol),
        _text_fact("seed: order of the data", arms, lambda run: f"{run.seed}: {run.summary['data_seed']}", by_seed=True),
        _text_fact("learning rate", arms, lambda run: f"{run.lr:g}"),
        _text_fact("attention kernel that ran", arms, lambda run: run.summary["kernel"]),
        _text_fact("precision", arms, lambda run: run.summary["precision"]),
        _text_fact("compiled", arms, lambda run: "yes" if run.summary["compiled"] else "no"),
        _text_fact("hardware", arms, lambda run: run.summary["device"]),
        _text_fact("torch", arms, lambda run: run.summary["torch"]),
        _text_fact("commit", arms, lambda run: _short_commit(run.summary["commit"])),
    ]  # fmt: skip
    return facts


def _parameters_of(block: str) -> Callable[[RunResult], int]:
    return lambda run: run.summary["parameters_by_block"].get(block, 0)


def _short_commit(commit: str | None) -> str:
    return "none" if commit is None else commit[:9] + ("+changes" if commit.endswith("+changes") else "")


def _number_fact(name: str, arms: Sequence[Arm], of: Callable[[RunResult], float]) -> Fact:
    numbers = {arm.name: sorted({of(run) for run in arm.runs}) for arm in arms}
    flat = [number for found in numbers.values() for number in found]
    texts = {arm: " / ".join(_number(number) for number in found) for arm, found in numbers.items()}
    spread = max(flat) / min(flat) - 1 if min(flat) > 0 else None
    return Fact(name, texts, len(set(flat)) == 1, spread)


def _number(number: float) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:,.3g}"


def _text_fact(name: str, arms: Sequence[Arm], of: Callable[[RunResult], str], *, by_seed: bool = False) -> Fact:
    """by_seed: differs from run to run of an arm by design; else runs of one arm that differ are a difference too."""
    texts = {arm.name: ", ".join(dict.fromkeys(of(run) for run in arm.runs)) for arm in arms}
    values = set(texts.values()) if by_seed else {of(run) for arm in arms for run in arm.runs}
    return Fact(name, texts, len(values) == 1)


def _differing_fields(arms: Sequence[Arm]) -> list[Fact]:
    """Fields of config.yaml in which the arms differ."""
    flat = {arm.name: dict(_flattened(arm.runs[0].config)) for arm in arms}
    names = dict.fromkeys(name for fields in flat.values() for name in fields)
    facts = []
    for name in names:
        values = {arm: str(fields[name]) if name in fields else "–" for arm, fields in flat.items()}
        if len(set(values.values())) > 1:
            facts.append(Fact(name, values, False))
    return facts


def _flattened(config: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in config.items():
        if not prefix and key in NOT_COMPARED:
            continue
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", "none" if value is None else value
