"""What a person sees of a study that runs: what was started, what has ended, and how long the rest will take."""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.files.text import at_tokens, counted, duration
from harness.files.untrusted import Unreadable, is_count, parse_object
from harness.runs.records import read_evaluations, read_summary
from harness.study.plan import RunSpec, StudyPlan

WORDS_SECONDS = 300.0  # from one line to the next where output is no terminal and no run ends


class Pace:
    """How fast runs go here: training by its tokens, and beside it what every run costs (its start, its evaluation).

    Known from runs that ended under this command, before that from the study's finished ones. An arm of which none has ended
    is taken to compute as many FLOPs a second as the others: too few for a larger model, which fills the device better.
    """

    def __init__(self, places: int, plan: StudyPlan) -> None:
        self.places, self._folder = places, plan.folder
        self.later: Sequence[RunSpec] = ()  # of phases that come after the one that runs
        self._flops = {name: arm.quantities["train_flops"] for name, arm in plan.arms.items()}  # a token
        self._speeds: dict[str, list[float]] = {}  # of an arm: tokens a second
        self._besides: dict[bool, list[float]] = {True: [], False: []}  # trained or converted -> seconds
        for path in plan.folder.glob("*/summary.json"):
            records: list[Mapping[str, Any]] = [*read_evaluations(path.parent)]
            scored = [float(record.get(key) or 0.0) for record in records for key in ("seconds", "extras_seconds")]
            speed = read_summary(path.parent).get("tokens_per_second")
            if scored and speed:
                self._speeds.setdefault(path.parent.name.rpartition("-lr")[0], []).append(speed)
                self._besides[True].append(sum(scored))
        self._from_files = True

    def learn(self, spec: RunSpec, seconds: float, tokens: int) -> None:
        """A run that ended well after so many seconds, in which it trained on `tokens`."""
        if self._from_files:
            self._speeds, self._besides, self._from_files = {}, {True: [], False: []}, False
        speed = read_summary(self._folder / spec.name).get("tokens_per_second")
        if speed and tokens:
            self._speeds.setdefault(spec.arm, []).append(float(speed))
        self._besides[bool(speed)].append(max(0.0, seconds - (tokens / float(speed) if speed else 0.0)))

    def seconds(self, arm: str, tokens: int, *, trained: bool = True) -> float | None:
        """Of an arm's run with so many tokens to train on, evaluation included; None while nothing is known."""
        besides, speed = self._besides[trained] or self._besides[not trained], self._speed(arm)
        if not besides or (tokens and speed is None):
            return None
        return statistics.fmean(besides) + (tokens / speed if tokens and speed else 0.0)

    def _speed(self, arm: str) -> float | None:
        """Tokens a second."""
        if arm in self._speeds:
            return statistics.median(self._speeds[arm])
        known = [speed * self._flops[other] for other in self._flops for speed in self._speeds.get(other, ())]
        return statistics.median(known) / self._flops[arm] if known else None

    def left(self, specs: Iterable[RunSpec], trained: Mapping[str, int], elapsed: Mapping[str, float]) -> float | None:
        """Seconds until all these and the later ones have ended.

        trained: tokens done before this command, by run; elapsed: seconds since the start of those that run.
        """
        whole = []
        for spec in [*specs, *self.later]:
            seconds = self.seconds(spec.arm, max(0, spec.tokens - trained.get(spec.name, 0)), trained=spec.tokens > 0)
            if seconds is None:
                return None
            whole.append(max(0.0, seconds - elapsed.get(spec.name, 0.0)))
        return max(max(whole, default=0.0), sum(whole) / self.places)


class Progress:
    """One display: a bar over all tokens that are to be trained, what runs now and what has ended."""

    def __init__(self, plan: StudyPlan, specs: Sequence[RunSpec], pace: Pace, *, title: str) -> None:
        from tqdm import tqdm

        self._folder, self._specs, self._title, self._pace = plan.folder, list(specs), title, pace
        self._before = {spec.name: trained_so_far(plan.folder / spec.name) for spec in specs}
        self._seen = dict(self._before)
        self._ended: set[str] = set()
        self._started: dict[str, float] = {}
        self._spoke = time.monotonic()
        self._bar = tqdm(
            total=sum(spec.tokens for spec in specs),
            initial=sum(self._before.values()),
            desc=title,
            unit="tok",
            unit_scale=True,
            disable=None,
            dynamic_ncols=True,
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt}{postfix}",
        )
        self._say(f"{title}: {counted(len(specs), 'run')} to do, {pace.places} at a time{self._time_left()}")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._bar.close()
        if kind is not None:
            self._say(f"{self._title}: stopped with {len(self._ended)} of {counted(len(self._specs), 'run')} done")

    def started(self, spec: RunSpec, log: Path) -> None:
        """A line that stays."""
        self._started[spec.name] = time.monotonic()
        self._say(f"started {spec.name}; its log: {log}")

    def update(self, running: Sequence[RunSpec]) -> None:
        """Read how far the runs have come."""
        for spec in running:
            self._advance(spec, min(spec.tokens, trained_so_far(self._folder / spec.name)))
        names = ", ".join(spec.name for spec in running[:3]) + (", ..." if len(running) > 3 else "")
        state = f"{len(self._ended)}/{len(self._specs)} runs{self._time_left()}; {names}"
        self._bar.set_postfix_str(state, refresh=True)
        if self._bar.disable and time.monotonic() - self._spoke > WORDS_SECONDS:
            self._say(f"{self._title}: {state}")

    def ended(self, spec: RunSpec, error: str | None, seconds: float) -> None:
        """A line that stays."""
        self._ended.add(spec.name)
        self._advance(spec, spec.tokens)
        if error is None:
            self._pace.learn(spec, seconds, spec.tokens - self._before[spec.name])
        how = f"FAILED: {error}" if error is not None else _figures(self._folder / spec.name)
        count = f"[{len(self._ended)}/{len(self._specs)}]"
        self._say(f"{count} {spec.name}: {how} ({duration(seconds)}){self._time_left()}")

    def _time_left(self) -> str:
        waiting = [spec for spec in self._specs if spec.name not in self._ended]
        if not waiting and not self._pace.later:
            return ""
        now = time.monotonic()
        seconds = self._pace.left(waiting, self._before, {name: now - began for name, began in self._started.items()})
        return "" if seconds is None else f"; about {duration(seconds)} left"

    def _say(self, line: str) -> None:
        self._spoke = time.monotonic()
        with contextlib.suppress(OSError):  # of a terminal that was closed: the study goes on
            self._bar.write(line)
            sys.stdout.flush()

    def _advance(self, spec: RunSpec, tokens: int) -> None:
        self._bar.update(max(0, tokens - self._seen[spec.name]))
        self._seen[spec.name] = max(tokens, self._seen[spec.name])


def trained_so_far(run: Path) -> int:
    """Tokens by the last whole line of metrics.jsonl; 0 where there is none."""
    path = run / "metrics.jsonl"
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 4096))
            lines = file.read().split(b"\n")[:-1]
        tokens = parse_object(lines[-1]).get("tokens") if lines else 0
    except (OSError, Unreadable):  # being written, or cut at the front of what was read
        return 0
    return tokens if isinstance(tokens, int) and is_count(tokens) else 0


def _figures(run: Path) -> str:
    summary = read_summary(run, "cache_bytes_per_token", "bits_per_byte")
    size = f"{summary['cache_bytes_per_token']:,} cache bytes per token{at_tokens([summary.get('cache_context')])}"
    return f"validation {summary['bits_per_byte']:.4f} bits per byte, {size}"
