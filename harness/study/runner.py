"""Runs of a study, each in a fresh process: a queue over the GPUs present, or one at a time on a CPU.

A run is judged by what it left on disk: with summary.json and the evaluations it is finished and skipped, with a
checkpoint it is continued by the very command that started it. A failed one does not stop the others. Children watch
their standard input, whose other end this process holds: when it dies, however it dies, so do they.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.config.places import ROOT
from harness.errors import UserError
from harness.runs.evaluations import judges
from harness.runs.folder import finished
from harness.runs.records import FailureRecord, read_evaluations, read_summary
from harness.study.plan import RunSpec, StudyPlan, merged
from harness.study.progress import Pace, Progress

WORKER = ROOT / "scripts" / "study_run.py"
POLL_SECONDS = 0.5
GRACE_SECONDS = 30.0  # for children that were told to stop


@dataclass(frozen=True)
class Slot:
    """A place where one run at a time computes."""

    environment: dict[str, str] = field(default_factory=dict)


def slots(gpus: Sequence[str], *, jobs: int | None, cores: int) -> list[Slot]:
    """One a GPU, or `jobs` a GPU; without GPUs one, or `jobs` that share the cores.

    Small models leave most of a GPU idle: several runs at a time finish sooner, each of them more slowly. Those on GPUs share
    the cores for compiling: by itself each process starts a compiler a core, though nearly all is compiled already (eight
    runs of `mini` on one GPU and 16 cores took 55 s with one each and 65 s otherwise).
    """
    if gpus:
        count = len(gpus) * (jobs or 1)
        shared = {"TORCHINDUCTOR_COMPILE_THREADS": str(max(1, cores // (2 * count)))} if count > 1 else {}
        return [Slot({"CUDA_VISIBLE_DEVICES": gpu} | shared) for _ in range(jobs or 1) for gpu in gpus]
    jobs = jobs or 1
    return [Slot({} if jobs == 1 else {"OMP_NUM_THREADS": str(max(1, cores // jobs))}) for _ in range(jobs)]


def visible_gpus(device: str) -> list[str]:
    """Of this machine, as CUDA_VISIBLE_DEVICES names them; none where the study computes elsewhere."""
    if device not in ("auto", "cuda"):
        return []
    import torch

    count, given = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",")[:count] if given else [str(gpu) for gpu in range(count)]


def is_done(plan: StudyPlan, spec: RunSpec) -> bool:
    """Trained to its end and evaluated as a study judges. Raises UserError for a run that is not what the plan says."""
    folder = plan.folder / spec.name
    if not finished(folder):
        return False
    summary = read_summary(folder)
    if summary.get("setup_hash") != spec.setup_hash or summary.get("seed") != spec.seed:
        raise UserError(
            f"{folder} is a run of another setup than this study's arm {spec.arm}: move it away, or give the study "
            f"another name=..."
        )
    return any(judges(record, summary["dataset"]) for record in read_evaluations(folder))


def check_texts_unchanged(plan: StudyPlan, specs: Sequence[RunSpec]) -> None:
    """Raises UserError when a finished run was trained on another text than its arm's corpus holds now.

    What it would be compared with is trained on the text of today.
    """
    from harness.runs.corpus import load_data, other_data

    known: dict[str, str] = {}  # fingerprints by what is read
    for spec in specs:
        config = plan.arms[spec.arm].config
        read = repr((config.dataset, config.tokenizer))
        if read not in known:
            known[read] = load_data(config).fingerprint
        if read_summary(plan.folder / spec.name).get("data_fingerprint") != known[read]:
            raise other_data(config.dataset.name, plan.folder / spec.name, "give the study another name=...")


def run_all(
    plan: StudyPlan,
    specs: Sequence[RunSpec],
    *,
    places: Sequence[Slot],
    evaluate_overrides: Sequence[str],
    title: str,
    pace: Pace | None = None,
) -> list[FailureRecord]:
    """Train and evaluate what is not done yet. Returns the failures; on an interruption every child is stopped first.

    evaluate_overrides: of the machine, for every run alike; the study's own come before them. pace: of a command with
    several phases, so that the later ones know what the earlier ones took.
    """
    pace = pace or Pace(len(places), plan.folder)
    todo = [spec for spec in specs if not is_done(plan, spec)]
    check_texts_unchanged(plan, [spec for spec in specs if spec not in todo])
    if len(todo) < len(specs):
        print(f"{title}: {len(specs) - len(todo)} of {len(specs)} runs are finished already", flush=True)
    if not todo:
        return []
    (plan.folder / "logs").mkdir(parents=True, exist_ok=True)
    failures: list[FailureRecord] = []
    waiting, free = list(todo), list(places)
    running: dict[subprocess.Popen[bytes], tuple[RunSpec, Slot, float]] = {}
    with Progress(plan, todo, pace, title=title) as progress, _interruptible(running):
        while waiting or running:
            while free and (ready := [each for each in waiting if each.source is None or finished(plan.folder / each.source)]):
                spec, slot = ready[0], free.pop(0)
                waiting.remove(spec)
                conversion = plan.conversion(spec)
                command = [
                    sys.executable,
                    str(WORKER),
                    *(plan.overrides(spec) if conversion is None else ["convert", *conversion]),
                    "--",
                    f"run={spec.name}",
                    f"runs_dir={plan.folder}",
                    *merged([*plan.config.evaluate, *evaluate_overrides]),
                ]
                log = plan.folder / "logs" / f"{spec.name}.log"
                running[_start(command, slot, log)] = (spec, slot, time.monotonic())
                progress.started(spec, log)
            if not running:  # what is left waits for runs that failed, or are not among these
                for spec in waiting:
                    reason = f"the run whose weights it starts from, {spec.source}, is not finished"
                    failures.append({"run": spec.name, "error": reason})
                    progress.ended(spec, reason, 0.0)
                break
            time.sleep(POLL_SECONDS)
            for process in [process for process in running if process.poll() is not None]:
                spec, slot, started = running.pop(process)
                free.append(slot)
                error = None
                if process.returncode or not is_done(plan, spec):
                    error = last_words(plan.folder / "logs" / f"{spec.name}.log", process.returncode)
                    failures.append({"run": spec.name, "error": error})
                progress.ended(spec, error, time.monotonic() - started)
            progress.update([spec for spec, _, _ in running.values()])
    return failures


def _start(command: Sequence[str], slot: Slot, log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | slot.environment,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


@contextlib.contextmanager
def leaving_on(*signals: signal.Signals) -> Iterator[None]:
    """They leave as SIGINT does, by an exception. One that is ignored, as nohup asks for, stays so."""

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in signals if signal.getsignal(number) is not signal.SIG_IGN}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _interruptible(running: Mapping[subprocess.Popen[bytes], Any]) -> Iterator[None]:
    """Whatever ends the block, no child outlives it."""
    try:
        with leaving_on(signal.SIGTERM):
            yield
    finally:
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + GRACE_SECONDS
        for process in running:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def last_words(log: Path, status: int) -> str:
    """The error's sentence in a run's log, else the first line of what was raised last, else the last line."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    traces = [number for number, line in enumerate(lines) if line.startswith("Traceback (most recent call last)")]
    raised = [line for line in lines[traces[-1] + 1 :] if not line[0].isspace()] if traces else []
    words = [*errors[-1:], *raised[:1], *lines[-1:], "it said nothing"][0]
    return f"{words} (status {status}; {log})"


@dataclass(frozen=True)
class Rates:
    """The learning rate of each arm, and what it took to find them."""

    chosen: dict[str, float]
    sweep: list[RunSpec] = field(default_factory=list)
    failures: list[FailureRecord] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # sentences for the reader


def tuned(plan: StudyPlan, arms: Sequence[str], run: Callable[[Sequence[RunSpec]], list[FailureRecord]]) -> Rates:
    """The sweep of tune=lr.

    Every arm gets the same rates. The sweep's rates are judged by the validation loss at the end of each run; a run that
    fails counts as infinitely bad. An arm without a finished run gets no rate and a sentence; the others go on. Raises
    UserError when no arm has one.
    """
    from harness.study.tuning import grown_grid, optimum

    tune = plan.config.tune
    assert tune is not None
    grid, failures, notes = plan.first_rates(), [], []  # type: ignore[var-annotated]
    for extension in range(tune.extensions + 1):
        specs = [plan.spec(arm, lr, plan.tuning_seed, tune.tokens) for lr in grid for arm in arms]
        failed = {failure["run"] for failure in failures}
        failures += run([spec for spec in specs if spec.name not in failed])
        losses = {arm: {spec.lr: _final_loss(plan, spec) for spec in specs if spec.arm == arm} for arm in arms}
        swept = {arm: of_arm for arm, of_arm in losses.items() if min(of_arm.values()) < float("inf")}
        if not swept:
            raise UserError(f"no run of the sweep of {', '.join(arms)} has finished; the logs are in {plan.folder / 'logs'}")
        grown = grown_grid(grid, swept)
        if len(grown) == len(grid) or extension == tune.extensions:
            break
        grid = grown
    chosen = {arm: optimum(of_arm) for arm, of_arm in swept.items()}
    notes += [f"{arm}: no run of its sweep has finished, so it has no rate and no runs" for arm in arms if arm not in swept]
    for arm, best in chosen.items():
        if best.at_edge:
            notes.append(f"{arm}: the lowest loss of the sweep is at its edge, {best.lr:g}; the optimum may lie beyond")
    if tune.tokens is not None and tune.transfer_arms:
        transfer = [plan.spec(arm, lr, plan.tuning_seed) for arm in tune.transfer_arms if arm in chosen for lr in grid]
        failures += run(transfer)
        specs += transfer
        for arm in tune.transfer_arms:
            full = {spec.lr: _final_loss(plan, spec) for spec in transfer if spec.arm == arm}
            if full and min(full.values()) < float("inf"):
                notes.append(
                    f"{arm}: best rate {chosen[arm].lr:g} at {tune.tokens:,} tokens, {optimum(full).lr:g} at the study's budget"
                )
    return Rates({arm: best.lr for arm, best in chosen.items()}, specs, failures, notes)


def _final_loss(plan: StudyPlan, spec: RunSpec) -> float:
    folder = plan.folder / spec.name
    return float(read_summary(folder, "loss")["loss"]) if finished(folder) else float("inf")
