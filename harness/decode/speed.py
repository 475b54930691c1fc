"""What decoding costs: time to the first token and per token, bytes that must move, cache, largest batch, crossovers.

Readings of all subjects (harness/decode/subjects.py) take turns, so that what slows the machine down for a
while slows all of them. Every step of a reading is clocked (on CUDA by events in its stream, and the device is waited
for); figures are medians over the steps of all readings with quartiles, warm-up excluded.

Bytes that must move in a step, at least: every weight of what is timed once, in its dtype (of an embedding that is not
the head as well, only a row a token is read: not counted), and the entries of all visible tokens, by the buffers of the
cache. What a path writes and reads beyond that (expanded keys and values, logits) is not counted: the share of the
bandwidth says how far a step is from the least that it could take. A share above 1 was served by the processor's caches.

Letters: B batch, T new tokens in this call, S cached tokens (the context).
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from tqdm import tqdm

from harness.decode.subjects import (
    INPUTS,
    WARM_UP_CALLS,
    Cell,
    DecodePlan,
    DecodeSubject,
    Part,
    Skipped,
    Writer,
    cache_bytes,
    caches_in_rotation,
    filled_cache,
    random_inputs,
    weight_bytes,
)
from modeling.attention.cache import Cache
from modeling.generation import decode_step, generate
from modeling.gpt import GPT

READING_SECONDS = 1.0  # a reading has as many steps as fit, at most DecodePlan.steps, at least one


@dataclass(frozen=True)
class Spread:
    """Seconds: the median of n of them, with the quartiles."""

    median: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        low, median, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else 3 * [seconds[0]]
        return cls(median, low, high, len(seconds))


@dataclass(frozen=True)
class DecodeTime:
    """One row of the table: one way to compute one variant at one batch size and context."""

    row: str
    variant: str
    path: str  # auto | expand | absorbed | the name of a Writer
    batch_size: int
    context: int
    queries: int  # new tokens a call
    first_token: Spread | None
    call: Spread  # seconds a step, which is a token a row where queries is 1
    tokens_per_second: float  # all rows
    step_bytes: int  # that must move, at least
    bytes_per_second: float
    of_bandwidth: float  # that was measured in the same run
    cache_bytes: int  # allocated for the context, all rows, of what is timed
    cache_bytes_per_token: int  # of the context
    largest_batch: int | None  # of the whole model within the budget; None where that is not ours to say


@dataclass
class Results:
    figures: list[DecodeTime] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    bandwidth: float = 0.0  # bytes per second


@dataclass
class Job:
    """Something that is timed in turns with others, and the rows that it speaks for. Quantities: first, call."""

    rows: tuple[str, ...]
    read: Callable[[], Mapping[str, list[float]]]
    path: str = ""  # "" speaks for rows of other jobs
    cache_bytes: Callable[[int], int] = field(default=lambda context: 0)  # of a sequence of so many tokens
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"first": [], "call": []})


@torch.inference_mode()
def measure(cells: Sequence[Cell], plan: DecodePlan) -> Results:
    """Time every cell, and the bandwidth before and after each: the best counts, since other work can only lower it."""
    results = Results(bandwidth=read_bandwidth(plan))
    readings = plan.rounds * sum(len(group) for cell in cells for group in cell.groups)
    with tqdm(total=readings, unit="reading", disable=None) as bar:
        for cell in cells:
            bar.set_description(f"batch {cell.batch_size}, context {cell.context:,}", refresh=False)
            figures, skipped = measure_cell(cell, plan, progress=bar.update)
            results.figures += figures
            results.skipped += skipped
            results.bandwidth = max(results.bandwidth, read_bandwidth(plan))
    results.figures = [
        dataclasses.replace(figure, of_bandwidth=figure.bytes_per_second / results.bandwidth) for figure in results.figures
    ]
    return results


@torch.inference_mode()
def measure_cell(
    cell: Cell, plan: DecodePlan, *, seconds: float = math.inf, progress: Callable[[int], object] = lambda readings: None
) -> tuple[list[DecodeTime], list[Skipped]]:
    """Time one cell; of_bandwidth is nan, since no bandwidth is measured.

    seconds: after so many no further round begins, the subjects of every group having had an equal share of them. The
    first round of each group is always whole. progress(n): n readings are done.
    """
    figures, skipped = [], list(cell.skipped)
    subjects = sum(map(len, cell.groups))
    for group in cell.groups:
        share = seconds * len(group) / subjects
        figures += _in_turns(group, cell, plan, skipped, share, progress)
        gc.collect()
        if plan.device.type == "cuda":
            torch.cuda.empty_cache()
        if plan.step_used == "compile":
            torch.compiler.reset()  # one graph a shape, never a dynamic one made from several
    return figures, skipped


def _in_turns(
    group: Sequence[DecodeSubject],
    cell: Cell,
    plan: DecodePlan,
    skipped: list[Skipped],
    share: float,
    progress: Callable[[int], object],
) -> list[DecodeTime]:
    """The figures of subjects whose readings take turns; no round begins after `share` seconds, but for the first."""
    began = time.perf_counter()
    generator = torch.Generator(plan.device).manual_seed(plan.seed)
    jobs: list[tuple[DecodeSubject, Job]] = []
    for subject in group:
        try:
            subject.part.eval()
            jobs += [(subject, job) for job in _jobs(subject, cell, plan, generator)]
        except torch.OutOfMemoryError:
            skipped.append(Skipped(subject.name, cell.batch_size, cell.context, cell.queries, "no memory left for it"))
            torch.cuda.empty_cache()
    for number in range(plan.rounds):
        if number and time.perf_counter() - began > share:
            break
        for _, job in jobs:
            for quantity, seconds in job.read().items():
                job.seconds[quantity] += seconds
        progress(len(group))
    figures = []
    for subject, job in jobs:
        if job.path:
            firsts = [other.seconds["first"] for _, other in jobs if job.rows[0] in other.rows]
            figures.append(_figure(subject, job, cell, list(itertools.chain(*firsts)), plan))
    return figures


def _figure(subject: DecodeSubject, job: Job, cell: Cell, firsts: list[float], plan: DecodePlan) -> DecodeTime:
    B, S, T = cell.batch_size, cell.context, cell.queries
    call = Spread.of(job.seconds["call"])
    step_bytes = weight_bytes(subject.part) + B * job.cache_bytes(S + T)
    ours = subject.writer is None or job.path != subject.writer.name
    return DecodeTime(
        row=job.rows[0],
        variant=subject.name,
        path=job.path,
        batch_size=B,
        context=S,
        queries=T,
        first_token=Spread.of(firsts) if firsts else None,
        call=call,
        tokens_per_second=B * T / call.median,
        step_bytes=step_bytes,
        bytes_per_second=step_bytes / call.median,
        of_bandwidth=math.nan,
        cache_bytes=B * job.cache_bytes(S),
        cache_bytes_per_token=round(job.cache_bytes(S) / S),
        largest_batch=subject.whole.largest_batch(S, plan.budget_bytes) if ours else None,
    )


def _jobs(subject: DecodeSubject, cell: Cell, plan: DecodePlan, generator: torch.Generator) -> Iterator[Job]:
    """All that is timed of a subject in a cell, warmed up."""
    part, B, S, T = subject.part, cell.batch_size, cell.context, cell.queries
    sizes = functools.partial(cache_bytes, part, plan.cache_dtype)
    inputs = [random_inputs(part, B, T, plan, generator) for _ in range(INPUTS)]
    count = caches_in_rotation(part, B * sizes(S), plan) if T == 1 else 1
    caches = [filled_cache(part, B, S, plan, generator) for _ in range(count)]
    for path in subject.paths:
        subject.select(path)
        if T == 1:  # a part that is not a GPT offers what a decode step asks of one
            steps = [decode_step(cast("GPT", part), cache, plan.step, inputs[0][:, 0], None) for cache in caches]
            timed = _Steps(subject, path, steps, [x[:, 0] for x in inputs], caches, T, plan.device)
        else:
            timed = _Steps(subject, path, [_call(part, caches[0])], inputs, caches, T, plan.device)
        calls = timed.warm_up(plan.steps)
        yield Job((subject.row(path),), timed.reader(calls), path, sizes)

    if T > 1 or plan.prefill_tokens < B * S:
        return
    if subject.prefills:
        read = _prefill(subject, random_inputs(part, B, S, plan, generator), plan)
        read()
        yield Job(tuple(map(subject.row, subject.paths)), read)
    if isinstance(part, GPT) and plan.generate:
        prompts_BT = random_inputs(part, B, S, plan, generator)
        writers = [Writer("generate", _our_writing(subject, part, plan), sizes, 0)]
        for writer in writers if subject.writer is None else [*writers, subject.writer]:
            read = _writing(writer, prompts_BT, plan)
            read()
            yield Job((f"{subject.name}, {writer.name}",), read, writer.name, writer.cache_bytes)


def _call(part: Part, cache: Sequence[Cache]) -> Callable[[Tensor, Tensor | None], Tensor]:
    """A call of several new tokens in place of a decode step."""

    def call(inputs: Tensor, running_B: Tensor | None) -> Tensor:
        out: Tensor = part(inputs, cache)
        return out

    return call


@dataclass
class _Steps:
    """Steps of one path; inputs and caches are in a rotation that goes on from one reading to the next.

    The context grows with every step. Single tokens are taken back after a reading: what is 16 tokens more or less.
    Calls of several are taken back one by one, or the context would soon be another; that adds an addition a layer.
    """

    subject: DecodeSubject
    path: str
    steps: Sequence[Callable[[Tensor, Tensor | None], Tensor]]
    inputs: Sequence[Tensor]
    caches: Sequence[Sequence[Cache]]
    queries: int
    device: torch.device
    taken: int = 0
    before: list[list[dict[str, Tensor]]] = field(init=False)  # states of each layer of each cache

    def __post_init__(self) -> None:
        self.before = [
            [{name: state.clone() for name, state in cache.states.items()} for cache in caches] for caches in self.caches
        ]

    def seconds(self, count: int) -> list[float]:
        """Seconds that each of `count` steps takes."""
        self.subject.select(self.path)
        turns = range(self.taken, self.taken + count)
        self.taken += count
        clock = Clock(self.device)
        for turn in turns:
            self.steps[turn % len(self.steps)](self.inputs[turn % len(self.inputs)], None)
            if self.queries > 1:
                self._take_back(turn)
            clock.mark()
        seconds = clock.seconds()
        for turn in turns if self.queries == 1 else ():
            self._take_back(turn)
        return seconds

    def _take_back(self, turn: int) -> None:
        place = turn % len(self.caches)
        for cache, states in zip(self.caches[place], self.before[place], strict=True):
            cache.take_back(self.queries, states)

    def warm_up(self, most: int) -> int:
        """Run until times settle; how many steps a reading should have."""
        (seconds,) = self.seconds(1)
        if seconds < READING_SECONDS:
            seconds = min(self.seconds(WARM_UP_CALLS - 1))
        return max(1, min(most, int(READING_SECONDS / seconds)))

    def reader(self, count: int) -> Callable[[], Mapping[str, list[float]]]:
        return lambda: {"call": self.seconds(count)}


def _prefill(subject: DecodeSubject, prompt: Tensor, plan: DecodePlan) -> Callable[[], Mapping[str, list[float]]]:
    """Reading a prompt into a new cache, up to the logits, on the path that attention.decode=auto takes."""

    def read() -> Mapping[str, list[float]]:
        subject.select("auto")
        clock = Clock(plan.device)
        cache = subject.part.new_cache(*prompt.shape[:2], dtype=plan.cache_dtype, device=plan.device)
        subject.part(prompt, cache)
        clock.mark()
        return {"first": clock.seconds()}

    return read


def _our_writing(subject: DecodeSubject, model: GPT, plan: DecodePlan) -> Callable[[Tensor, int, Callable[[], None]], None]:
    """Greedy generation as scripts/generate.py does it."""

    def write(prompts_BT: Tensor, new_tokens: int, stamp: Callable[[], None]) -> None:
        subject.select("auto")
        for _ in generate(
            model, prompts_BT.tolist(), max_new_tokens=new_tokens, temperature=0, cache_dtype=plan.cache_dtype, step=plan.step
        ):
            stamp()

    return write


def _writing(writer: Writer, prompts_BT: Tensor, plan: DecodePlan) -> Callable[[], Mapping[str, list[float]]]:
    """End to end. The second token counts as neither: before it a decode step may be captured or compiled."""

    def read() -> Mapping[str, list[float]]:
        clock = Clock(plan.device)
        writer.write(prompts_BT, plan.steps + 2, clock.mark)
        first, _, *others = clock.seconds()
        return {"first": [first], "call": others}

    return read


class Clock:
    """Seconds between the start and each mark. Marks do not make the host wait for a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[Any] = []
        synchronise(device)
        self.mark()

    def mark(self) -> None:
        if self._device.type == "cuda":
            self._marks.append(torch.cuda.Event(enable_timing=True))
            self._marks[-1].record()
        else:
            synchronise(self._device)
            self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Waits for the device."""
        synchronise(self._device)
        pairs = itertools.pairwise(self._marks)
        if self._device.type == "cuda":
            return [earlier.elapsed_time(later) / 1e3 for earlier, later in pairs]
        return [later - earlier for earlier, later in pairs]


def synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def machine_name(device: torch.device) -> str:
    """The GPU's name; of another device its type and how many threads torch may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, threads: {torch.get_num_threads()}"


def swept_bytes(plan: DecodePlan) -> int:
    """How much is read to measure the bandwidth: far more than caches hold."""
    return max(2**26, min(2**31 if plan.device.type == "cuda" else 2**30, plan.budget_bytes // 4))


def read_bandwidth(plan: DecodePlan) -> float:
    """Bytes per second that are read: the faster of a sum and a product with a vector, best of ten each."""
    rows = torch.ones(max(1, swept_bytes(plan) // 4096), 1024, device=plan.device)
    vector = torch.ones(1024, device=plan.device)
    best = math.inf
    for read in (rows.sum, lambda: torch.mv(rows, vector)):
        read()
        clock = Clock(plan.device)
        for _ in range(10):
            read()
            clock.mark()
        best = min(best, *clock.seconds())
    return rows.nbytes / best
