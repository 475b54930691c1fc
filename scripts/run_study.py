"""From a question to a matched comparison with error bars: python scripts/run_study.py study=NAME [key=value ...].

Any other key=value is an override of every run (model=small, budget.tokens=4e6, device=cpu, tracking=none, ...).

The runs of an arm share a process, one after another. Repeating the command skips finished runs and continues interrupted ones;
runs that were finished elsewhere count when their folders are copied into the study's. A failed run is reported at the end.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.entry.bootstrap import ROOT, enter_environment

enter_environment()

import contextlib
import json
import math
import os
import shlex
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from harness.config.places import user_path
from harness.config.typed import did_you_mean
from harness.entry.cli import options_and_overrides, pasteable, run_script, whole_numbers
from harness.errors import UserError, writable
from harness.files.text import aligned, duration, number, visible
from harness.files.untrusted import Positive
from harness.runs.folder import finished, lock_run
from harness.runs.records import (
    DECODE_FILE,
    STUDY_FILE,
    DecodePlaces,
    DecodeTimes,
    FailureRecord,
    SpecRecord,
    read_decode_times,
    save,
)
from harness.tracking import check_tracking

if TYPE_CHECKING:
    from harness.study.plan import RunSpec, StudyPlan
    from harness.study.runner import Rates, Slot

# Of the machine rather than of the run: what is said of them for training holds for evaluating too.
_FOR_EVALUATION = ("device", "precision", "data_dir", "tracking", "tracking.project", "tracking.entity")


@dataclass
class StudyOptions:
    study: Annotated[str, "a YAML of configs/study"] = "demo"
    dry_run: Annotated[
        bool, "print every run with its parameters, FLOPs, cache bytes, the time by those finished, and stop"
    ] = False
    tune: Annotated[
        Literal["lr", "none", "stored"] | None,
        "lr: sweep the learning rate of each arm first; none: one rate for all; stored: the rates of an earlier sweep of "
        "this study; null: lr where the study declares a sweep",
    ] = None
    arms: Annotated[str | None, "some of the arms, separated by commas"] = None
    seeds: Annotated[str | None, "other seeds than the study's, separated by commas"] = None
    jobs: Annotated[Positive | None, "runs at a time: for each GPU, or on a CPU in all; null: one"] = None
    name: Annotated[str | None, "of the study's folder below runs_dir; null: the study's"] = None
    runs_dir: Annotated[str, "the study's runs and its report lie in <runs_dir>/<name>"] = str(ROOT / "runs")
    report: Annotated[bool, "write the report at the end (python scripts/report.py study=NAME does it again)"] = True
    sweep_file: Annotated[str | None, "write the same runs as a W&B sweep to this file, and stop"] = None


@dataclass(frozen=True)
class Command:
    """What of a study this command does."""

    plan: StudyPlan
    arms: list[str]
    tune: str  # lr, none or stored
    options: StudyOptions
    overrides: list[str]  # of every run
    declared: dict[str, list[int]] = field(default_factory=dict)  # seeds of the study's YAML, of each arm

    @property
    def places(self) -> list[Slot]:
        """Where its runs compute on this machine, one at a time in each."""
        from harness.study.runner import slots, visible_gpus

        return slots(visible_gpus(self.plan.first.device), jobs=self.options.jobs, cores=os.cpu_count() or 1)


def main(arguments: list[str]) -> int:
    options, overrides = options_and_overrides(StudyOptions, arguments)

    from harness.study.gpu_service import multi_process_service
    from harness.study.plan import build_plan, check_same_study, load_study, settle_tuning_seed

    config = load_study(options.study)
    if options.tune == "lr" and config.tune is None:
        raise UserError(f"study={options.study} declares no sweep (tune: in its YAML), so tune=lr has no rates to try")
    declared = {arm: config.seeds_of(arm) for arm in config.arms}
    if options.seeds is not None:
        config.seeds, config.primary_seeds = whole_numbers("seeds", options.seeds, least=0), None
    config.base += overrides
    plan = build_plan(
        config,
        name=options.name or options.study,
        command=shlex.join(["python", "scripts/run_study.py", *arguments]),
        runs_dir=user_path(options.runs_dir),
    )
    tune = options.tune or ("none" if config.tune is None else "lr")
    command = Command(plan, _chosen_arms(plan, options.arms), tune, options, overrides, declared)
    print_arms(plan)
    check_same_study(plan)
    if tune == "lr":
        settle_tuning_seed(plan)
    if options.sweep_file is not None:
        return write_sweep_file(command)
    check_tracking(plan.first.tracking)
    if options.dry_run:
        return print_runs(command)
    with contextlib.ExitStack() as held:
        if options.arms is None:
            held.enter_context(lock_run(plan.folder))
        held.enter_context(telling_how_to_continue(arguments))
        return run_study(command, held.enter_context(multi_process_service(command.places)))


@contextlib.contextmanager
def telling_how_to_continue(arguments: Sequence[str]) -> Iterator[None]:
    """Stopped by a signal, the command leaves with the line that goes on with it, as it was typed."""
    from harness.study.runner import leaving_on

    with leaving_on(signal.SIGTERM, signal.SIGHUP):
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            with contextlib.suppress(OSError):  # of a terminal that was closed
                print(
                    "stopped: what is finished is kept, what was under way goes on from its last checkpoint; continue with\n"
                    f"  {pasteable(__file__, arguments)}",
                    flush=True,
                )
            raise


def run_study(command: Command, places: Sequence[Slot]) -> int:
    """Sweep, train, evaluate, measure decoding, report."""
    from harness.report.write import report_study
    from harness.runs.corpus import load_data
    from harness.study.progress import Pace
    from harness.study.results import load_results
    from harness.study.runner import process_pool, run_all

    plan, arms, first = command.plan, command.arms, command.plan.first
    if command.tune == "stored":
        _stored_rates(command)  # refused before the data, which may take long
    load_data(first)  # once, before many processes ask for it
    evaluate = [a for a in command.overrides if a.partition("=")[0] in _FOR_EVALUATION]
    evaluate += [f"data_dir={first.data_dir}"]

    pace = Pace(len(places), plan)
    with process_pool(places) as pool:

        def train(specs: Sequence[RunSpec], title: str) -> list[FailureRecord]:
            return run_all(plan, specs, pool=pool, evaluate_overrides=evaluate, title=title, pace=pace)

        if command.tune == "lr":  # at rates that the sweep has yet to find: as many runs, as long
            pace.later = plan.main_runs(plan.untuned_rates(arms), arms)
        rates = _rates(command, lambda specs: train(specs, "sweep"))
        specs = plan.main_runs(rates.chosen, [arm for arm in arms if arm in rates.chosen])
        keep(command, rates, specs, rates.failures)
        pace.later = ()
        failures = rates.failures + train(specs, "runs")
    keep(command, rates, specs, failures)
    report: str | None = None
    untimed: UserError | None = None
    # Where nothing has finished the failures are what there is to say.
    if command.options.report and any(run.evaluation() for run in load_results(plan.folder).runs):
        if plan.config.decode_contexts:
            try:
                measure_decoding(plan)
            except UserError as error:  # the runs have their report all the same
                untimed = error
        _, files = report_study(plan.folder, first.tracking)
        report = str(files[0])
    for note in rates.notes:
        print(f"note: {visible(note)}")
    # The failures' sentences and every run are in the record, the report's files beside it.
    line = {"study": plan.name, "folder": str(plan.folder), "record": str(plan.folder / STUDY_FILE), "report": report}
    print(json.dumps(line | {"runs": len(specs), "sweep": len(rates.sweep), "failures": len(failures)}))
    wrong = [f"the report of {plan.name} is written without decode times: {untimed}"] if untimed is not None else []
    if failures:
        lines = "; ".join(f"{failure['run']}: {failure['error']}" for failure in failures)
        begun = len(specs) + len(rates.sweep)
        how_many = f"{len(failures)} of {begun} runs of {plan.name} failed, the others are finished"
        if len(failures) == begun:
            how_many = f"all {begun} runs of {plan.name} failed"
        wrong.append(f"{how_many}: {lines}")
    if wrong:
        raise UserError("; ".join(wrong))
    return 0


def _rates(command: Command, train: Callable[[Sequence[RunSpec]], list[FailureRecord]]) -> Rates:
    from harness.study.runner import Rates, tuned

    plan, arms = command.plan, command.arms
    if command.tune == "lr":
        return tuned(plan, arms, train)
    if command.tune == "none":
        return Rates(plan.untuned_rates(arms))
    return Rates(_stored_rates(command))


def _stored_rates(command: Command) -> dict[str, float]:
    """What an earlier sweep chose. Raises UserError for arms that none has."""
    stored = _earlier(command.plan)["chosen_lr"]
    if lacking := [arm for arm in command.arms if arm not in stored]:
        raise UserError(f"{command.plan.folder} holds no tuned rate of {', '.join(lacking)}; sweep them with tune=lr")
    return {arm: stored[arm] for arm in command.arms}


def keep(command: Command, rates: Rates, specs: Sequence[RunSpec], failures: Sequence[FailureRecord]) -> None:
    """Write study.json, beside what other commands have written there of other arms and other seeds."""
    from harness.study.history import extended
    from harness.study.plan import record_alone, write_record
    from harness.study.tuning import as_named

    plan, arms, tune = command.plan, command.arms, command.tune
    with record_alone(plan):
        before = _earlier(plan)
        named = {spec.name for spec in specs}
        # Seeds that other commands finished at these very rates, such as the agents of a W&B sweep: one command a seed.
        others = [
            spec
            for spec in _specs_of(plan, before["runs"])
            if spec.arm not in arms
            or (
                spec.arm in rates.chosen
                and spec.name not in named
                and math.isclose(spec.lr, as_named(rates.chosen[spec.arm]))
                and finished(plan.folder / spec.name)
            )
        ]
        untuned = arms if tune == "none" else ()
        chosen = {arm: lr for arm, lr in (before["chosen_lr"] | rates.chosen).items() if arm not in untuned}
        sweep = [spec for spec in _specs_of(plan, before["sweep"]) if tune != "lr" or spec.arm not in arms]
        runs = [*specs, *others]
        # At other rates now, or of arms that are gone, earlier ones have been seen all the same.
        seen = {run["name"] for run in before["runs"]} | {spec.name for spec in runs}
        history = extended(
            plan.recorded(),
            arms={arm: sorted({*command.declared.get(arm, ()), *plan.config.seeds_of(arm)}) for arm in plan.arms},
            contrasts=[(a, b) for a, b in plan.config.contrasts],
            margin=plan.config.margin,
            metric=plan.config.metric,
            rates={arm: as_named(lr) if tune == "none" else None for arm, lr in plan.untuned_rates(plan.arms).items()}
            | {spec.arm: spec.lr for spec in runs},
            trends=[*plan.config.trends],
            results=sum(finished(plan.folder / name) for name in seen),
        )
        write_record(plan, chosen_lr=chosen, specs=runs, sweep=[*rates.sweep, *sweep], failures=failures, history=history)


def _earlier(plan: StudyPlan) -> Mapping[str, Any]:
    """What the folder's record holds of commands before this one."""
    return plan.recorded() or {"chosen_lr": {}, "runs": [], "sweep": []}


def _specs_of(plan: StudyPlan, recorded: Sequence[SpecRecord]) -> list[RunSpec]:
    """The recorded runs of arms that the study has."""
    return [plan.spec(run["arm"], run["lr"], run["seed"], run["budget"]) for run in recorded if run["arm"] in plan.arms]


def measure_decoding(plan: StudyPlan) -> None:
    """decode.json: what a token costs to decode for each arm, on this machine; once, until something else is asked for."""
    there, asked = read_decode_times(plan.folder), decode_places(plan)
    if there is not None and there.get("asked", asked) == asked:
        return
    from harness.study.decode_times import decode_times
    from harness.study.plan import vocabulary_of
    from harness.training.device import select_device, select_precision

    configs, first = {name: arm.config for name, arm in plan.arms.items()}, plan.first
    device = select_device(first.device)
    rows = decode_times(
        configs,
        vocab_size=vocabulary_of(first),
        contexts=asked["contexts"],
        batch_sizes=asked["batch_sizes"],
        device=device,
        dtype=select_precision(first.precision, device),
        max_seconds=300.0,
    )
    save(plan.folder / DECODE_FILE, DecodeTimes, {"rows": rows, "asked": asked})


def decode_places(plan: StudyPlan) -> DecodePlaces:
    contexts, batch_sizes = (sorted({*given}) for given in (plan.config.decode_contexts, plan.config.decode_batch_sizes))
    return {"arms": sorted(plan.arms), "contexts": contexts, "batch_sizes": batch_sizes}


def print_arms(plan: StudyPlan) -> None:
    """What is compared, and how well it is matched."""
    print(f"{plan.name}: {plan.config.question}")
    columns, *sizes = _sizes(plan, [*plan.arms])
    rows = [["arm", *columns, "matched"]]
    for (name, arm), cells in zip(plan.arms.items(), sizes, strict=True):
        matches = "; ".join(
            f"{match['quantity']} {number(match['mismatch'], '+.2%')} of {match['to']} by {match['vary']}={match['value']}"
            for match in arm.matches
        )
        rows.append([name, *cells, matches])
    print_table(rows)


def _sizes(plan: StudyPlan, names: Sequence[str]) -> list[list[str]]:
    """Names of columns, then the cells of each of these arms."""
    from harness.report.document import at_contexts

    arms = [plan.arms[name] for name in names]
    cache, sizes = at_contexts(
        "cache bytes/token", [f"{arm.quantities['kv_bytes']:,}" for arm in arms], [arm.config.model.max_seq_len for arm in arms]
    )
    of_arms = [(f"{arm.quantities['params']:,}", f"{arm.quantities['train_flops'] / 1e6:,.2f}") for arm in arms]
    return [["parameters", "MFLOP/token", cache], *([*of_arm, size] for of_arm, size in zip(of_arms, sizes, strict=True))]


def print_runs(command: Command) -> int:
    """dry_run: every run, and by the finished ones how long the rest takes."""
    from harness.study.progress import Pace, trained_so_far
    from harness.study.runner import is_done

    plan, arms = command.plan, command.arms
    sweep: list[RunSpec] = []
    if command.tune == "lr":
        grid = plan.first_rates()
        sweep = plan.sweep_runs(grid, arms) + plan.transfer_runs(grid, arms)
    main_runs = plan.main_runs(plan.untuned_rates(arms), arms)
    specs = [*sweep, *main_runs]
    columns, *sizes = _sizes(plan, [spec.arm for spec in specs])
    rows = [["run", *columns, "tokens", "state"]]
    todo = []
    for spec, cells in zip(specs, sizes, strict=True):
        folder, done = plan.folder / spec.name, is_done(plan, spec)
        todo += [] if done else [spec]
        state = "finished" if done else "to evaluate" if finished(folder) else "begun" if folder.is_dir() else ""
        rows.append([spec.name, *cells, f"{spec.tokens:,}", state])
    print_table(rows)
    if sweep:
        print("the rates of the main runs are those that the sweep finds; the shared one stands in their place here")
    at_a_time, trained = len(command.places), {spec.name: trained_so_far(plan.folder / spec.name) for spec in todo}
    seconds = Pace(at_a_time, plan).left(todo, trained, {})  # by the study's finished runs; None before there is one
    how_long = "how long is known once a run has ended" if seconds is None else f"about {duration(seconds)} by those finished"
    print(
        f"{len(todo)} of {len(sweep) + len(main_runs)} runs to do, {sum(spec.tokens for spec in todo):,} tokens, "
        f"{at_a_time} at a time; {how_long}"
    )
    print(json.dumps({"study": plan.name, "runs": len(main_runs), "sweep": len(sweep), "todo": len(todo), "seconds": seconds}))
    return 0


def write_sweep_file(command: Command) -> int:
    """The study's main runs as a W&B sweep: wandb sweep FILE, then wandb agent ID on as many machines as there are."""
    import yaml

    plan, arms, options = command.plan, command.arms, command.options
    stored = set(arms) <= set(_earlier(plan)["chosen_lr"])
    assert options.sweep_file is not None
    file = user_path(options.sweep_file)
    seeds = sorted({seed for arm in arms for seed in plan.config.seeds_of(arm)})
    name = [f"name={options.name}"] if options.name else []
    sweep = {
        "program": "scripts/run_study.py",
        "name": plan.name,
        "method": "grid",
        "metric": {"name": "val/bits_per_byte", "goal": "minimize"},
        "parameters": {"arms": {"values": arms}, "seeds": {"values": seeds}},
        "command": [
            "${env}",
            "${interpreter}",
            "${program}",
            f"study={options.study}",
            *name,
            f"runs_dir={user_path(options.runs_dir)}",
            f"tune={'stored' if stored else 'none'}",
            "report=false",
            *command.overrides,
            "${args_no_hyphens}",
        ],
    }
    with writable(f"sweep_file={file}", "choose another file"):
        file.write_text(yaml.safe_dump(sweep, sort_keys=False), encoding="utf-8")
    print(f"written: {file}; start it with: wandb sweep {shlex.quote(str(file))}")
    return 0


def _chosen_arms(plan: StudyPlan, text: str | None) -> list[str]:
    if text is None:
        return list(plan.arms)
    arms = [arm.strip() for arm in text.split(",")]
    for arm in arms:
        if arm not in plan.arms:
            raise UserError(f"arms={text}: {arm} is no arm of {plan.name}; {did_you_mean(arm, list(plan.arms))}")
    return list(dict.fromkeys(arms))


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Numbers to the right, the first and the last column to the left."""
    print("\n".join([*aligned(rows, left=(0, len(rows[0]) - 1)), ""]), flush=True)


if __name__ == "__main__":
    run_script(main, description=__doc__, options=StudyOptions, groups=("study",))
