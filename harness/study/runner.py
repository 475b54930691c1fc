"""Runs of a study, in processes of their own: a queue over the GPUs present, or one at a time on a CPU.

A process makes runs of one arm, one after another: they share what was imported and compiled, and differ in no setting that
a process keeps. A run is judged by what it left on disk: with summary.json and the evaluations it is finished and skipped,
with a checkpoint it is continued by the very command that started it. A failed one does not stop the others, and ends its
process. Processes watch their standard input, whose other end this one holds: when it dies, however it dies, so do they.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from harness.config.places import ROOT
from harness.data import PreparedData
from harness.errors import UserError
from harness.runs.evaluations import judges
from harness.runs.folder import finished
from harness.runs.provenance import changed_since
from harness.runs.records import FailureRecord, read_evaluations, read_summary
from harness.study.plan import RunSpec, StudyPlan, merged
from harness.study.progress import Pace, Progress
from harness.study.tuning import grown_grid, optimum

SCRIPT = ROOT / "scripts" / "study_run.py"
POLL_SECONDS = 0.5
GRACE_SECONDS = 30.0  # for processes that were told to stop
PROCESSES = 8  # at a time, those that wait for their arm's next run among them, where `jobs` asks for fewer
SHORT_SECONDS = 600.0  # runs of which it pays to keep the process, and the memory that it holds: starting takes some 10 s


@dataclass(frozen=True)
class Slot:
    """A place where one run at a time computes."""

    environment: dict[str, str] = field(default_factory=dict)


def slots(gpus: Sequence[str], *, jobs: int | None, cores: int) -> list[Slot]:
    """One a GPU, or `jobs` a GPU; without GPUs one, or `jobs` that share the cores.

    Small models leave most of a GPU idle: several runs at a time finish sooner, each of them more slowly. Those on GPUs
    share the cores for compiling. Left alone, each process starts as many compilers as there are cores, though nearly all is
    compiled already: eight runs of `mini` on one GPU and 16 cores took 65 s so, and 55 s with one compiler each.
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

    known: dict[str, PreparedData] = {}  # by what is read
    for spec in specs:
        config = plan.arms[spec.arm].config
        read = repr((config.dataset, config.tokenizer))
        if read not in known:
            known[read] = load_data(config)
        if not known[read].is_what(read_summary(plan.folder / spec.name).get("data_fingerprint")):
            raise other_data(config.dataset.name, plan.folder / spec.name, "give the study another name=...")


class RunProcess:
    """A process that makes runs of one arm, one after another, in one place (scripts/study_run.py)."""

    def __init__(self, arm: str, place: int, slot: Slot, log: Path) -> None:
        self.arm, self.place, self.since = arm, place, time.time()
        self.channel, theirs = socket.socketpair()
        with theirs, log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, str(SCRIPT)],
                cwd=ROOT,
                env=os.environ | slot.environment,
                stdin=theirs.fileno(),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def start(self, spec: RunSpec, request: str) -> None:
        """A run, by a line that study_run.py understands."""
        self.spec, self.run_since = spec, time.monotonic()
        with contextlib.suppress(OSError):  # a process that has ended meanwhile: status() says so
            self.channel.sendall(request.encode() + b"\n")

    def status(self) -> int | None:
        """Of its run; None while that goes on. A process that ended has ended with it."""
        with contextlib.suppress(OSError):  # nothing to read yet, or a process that ended
            if self.channel.recv(1, socket.MSG_DONTWAIT):
                return 0
        return self.process.poll()


class ProcessPool:
    """The processes of a study's command, as many at work as it has places. Made by `process_pool`.

    Those whose arm has another run to come wait for it, so that the order of runs need not follow the processes.
    """

    def __init__(self, places: Sequence[Slot]) -> None:
        self.places = places
        self._busy: list[RunProcess] = []
        self._idle: list[RunProcess] = []  # the one that has waited longest first
        self._leaving: list[subprocess.Popen[bytes]] = []

    @property
    def under_way(self) -> list[RunSpec]:
        return [each.spec for each in self._busy]

    @property
    def free(self) -> list[int]:
        """Places, by number."""
        return sorted({*range(len(self.places))} - {each.place for each in self._busy})

    def waiting(self, arm: str) -> RunProcess | None:
        """A process that has made runs of this arm and can go on at once."""
        free = self.free
        return next((each for each in self._idle if each.arm == arm and each.place in free), None)

    def start(self, spec: RunSpec, log: Path, *, make: Sequence[str], evaluate: Sequence[str]) -> None:
        """A run in a free place. make: the arguments of train_model.py, or `convert` and those of convert.py."""
        for each in list(self._idle):  # what a record says of the project's commit is true of the code in the process
            if each.process.poll() is not None or changed_since(each.since):
                self._end(each)
        log.touch()  # read in any case, were the process killed before it has written there
        process = self.waiting(spec.arm)
        if process is None:
            if self._idle and len(self._busy) + len(self._idle) >= max(PROCESSES, len(self.places)):
                self._end(self._idle[0])
            place = self.free[0]
            process = RunProcess(spec.arm, place, self.places[place], log)
        else:
            self._idle.remove(process)
        self._busy.append(process)
        process.start(spec, json.dumps({"log": str(log), "make": [*make], "evaluate": [*evaluate]}))

    def ended(self, arms: Collection[str]) -> list[tuple[RunSpec, int, float]]:
        """Runs that have ended, with status and seconds, waited for no longer than POLL_SECONDS.

        arms: those with runs to come, for which processes are kept.
        """
        select.select([each.channel for each in self._busy], [], [], POLL_SECONDS)
        found = []
        for each in list(self._busy):
            if (status := each.status()) is None:
                continue
            seconds = time.monotonic() - each.run_since
            found.append((each.spec, status, seconds))
            self._busy.remove(each)
            self._idle.append(each)
            if status or seconds > SHORT_SECONDS:
                self._end(each)
        for each in [each for each in self._idle if each.arm not in arms]:
            self._end(each)
        return found

    def _end(self, idle: RunProcess) -> None:
        """It ends with its standard input, and is not waited for."""
        self._idle.remove(idle)
        idle.channel.close()
        self._leaving = [process for process in [*self._leaving, idle.process] if process.poll() is None]

    def close(self) -> None:
        """Processes at work are told to stop, and in the end none is left."""
        for each in self._busy:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(each.process.pid, signal.SIGTERM)
        for each in list(self._idle):
            self._end(each)
        deadline = time.monotonic() + GRACE_SECONDS
        # A run that was at its very end takes no notice of the signal, and its process would wait for another.
        while self._busy and time.monotonic() < deadline:
            self.ended(())
        for process in [*(each.process for each in self._busy), *self._leaving]:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        for each in self._busy:
            each.channel.close()


@contextlib.contextmanager
def process_pool(places: Sequence[Slot]) -> Iterator[ProcessPool]:
    """Whatever ends the block, no process outlives it."""
    pool = ProcessPool(places)
    try:
        with leaving_on(signal.SIGTERM):
            yield pool
    finally:
        pool.close()


def run_all(
    plan: StudyPlan,
    specs: Sequence[RunSpec],
    *,
    pool: ProcessPool,
    evaluate_overrides: Sequence[str],
    title: str,
    pace: Pace | None = None,
) -> list[FailureRecord]:
    """Train and evaluate what is not done yet. Returns the failures.

    evaluate_overrides: of the machine, for every run alike; the study's own come before them. pace: of a command with
    several phases, so that the later ones know what the earlier ones took.
    """
    pace = pace or Pace(len(pool.places), plan)
    todo = [spec for spec in specs if not is_done(plan, spec)]
    check_texts_unchanged(plan, [spec for spec in specs if spec not in todo])
    if len(todo) < len(specs):
        print(f"{title}: {len(specs) - len(todo)} of {len(specs)} runs are finished already", flush=True)
    if not todo:
        return []
    (plan.folder / "logs").mkdir(parents=True, exist_ok=True)
    failures: list[FailureRecord] = []
    waiting = list(todo)
    with Progress(plan, todo, pace, title=title) as progress:
        while waiting or pool.under_way:
            while pool.free and (
                ready := [each for each in waiting if each.source is None or finished(plan.folder / each.source)]
            ):
                # A study cut short has its first seeds whole; of one seed, what is compiled in a process goes first.
                spec = min(ready, key=lambda each: (each.seed, pool.waiting(each.arm) is None))
                waiting.remove(spec)
                conversion, log = plan.conversion(spec), plan.folder / "logs" / f"{spec.name}.log"
                pool.start(
                    spec,
                    log,
                    make=plan.overrides(spec) if conversion is None else ["convert", *conversion],
                    evaluate=[
                        f"run={spec.name}",
                        f"runs_dir={plan.folder}",
                        *merged([*plan.config.evaluate, *evaluate_overrides]),
                    ],
                )
                progress.started(spec, log)
            if not pool.under_way:  # what is left waits for runs that failed, or are not among these
                for spec in waiting:
                    reason = f"the run whose weights it starts from, {spec.source}, is not finished"
                    failures.append({"run": spec.name, "error": reason})
                    progress.ended(spec, reason, 0.0)
                break
            for spec, status, seconds in pool.ended({each.arm for each in [*waiting, *pace.later]}):
                error = None
                if status or not is_done(plan, spec):
                    error = last_words(plan.folder / "logs" / f"{spec.name}.log", status)
                    failures.append({"run": spec.name, "error": error})
                progress.ended(spec, error, seconds)
            progress.update(pool.under_way)
    return failures


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
    tune = plan.config.tune
    assert tune is not None
    grid, failures, notes = plan.first_rates(), [], []  # type: ignore[var-annotated]
    for extension in range(tune.extensions + 1):
        specs = plan.sweep_runs(grid, arms)
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
    if transfer := plan.transfer_runs(grid, chosen):
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
