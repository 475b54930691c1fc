"""Everything one training run is made of: what its configuration settles, and what its data and newest checkpoint add."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harness.config.build import build_model, model_shapes
from harness.config.schema import TrainConfig
from harness.data import PreparedData
from harness.data.loader import documents_in
from harness.errors import UserError, tell
from harness.evaluation.model_facts import cache_remark, model_facts
from harness.evaluation.perplexity import Share, SplitResult
from harness.files.atomic import replacing
from harness.files.metrics import read_metrics
from harness.files.text import duration, plural, some_of
from harness.runs.corpus import ANEW, other_data, validate, window_loader
from harness.runs.init_from import initial_checkpoint, initial_line, tokens_seen
from harness.runs.load import check_finite, compute_like, pin_execution, token_losses
from harness.runs.records import RunSummary
from harness.runs.summary import Computation, Training, run_summary
from harness.runs.to_dashboard import open_run_tracker
from harness.runs.training_state import SavedState, check_resumable
from harness.tracking import SilentTracker, Tracker, check_tracking
from harness.training.checkpoint import Checkpoint, latest_checkpoint, load_checkpoint, snapshot, tidy, verified
from harness.training.checkpoint_writer import CheckpointWriter
from harness.training.device import (
    auto_micro_batch_size,
    keep_freed_memory,
    loss_chunk_tokens,
    peak_flops,
    peak_memory_bytes,
    reset_peak_memory,
    seed_everything,
    select_compile,
    select_precision,
    set_deterministic,
)
from harness.training.interruption import SIGNALS, Interrupted, Interruption
from harness.training.loop import Step, train
from harness.training.nonfinite import Guard, NonFiniteError, locate
from harness.training.optimizer import build_optimizer, choose_recipe
from harness.training.parallel import Workers, check_parallel, share_model
from harness.training.schedule import Schedule, training_steps
from harness.training.step import WARM_UP, CapturedStep, EagerStep, select_capture

TIMED_SECONDS = 2.0  # of training, after which the rest is foretold


class Session:
    """One training run, from its configuration to its summary; `open` makes it ready for its next step.

    Only what data decide (the vocabulary, and with it the model) waits for `open`: the rest is built once, here.
    """

    def __init__(self, config: TrainConfig, workers: Workers) -> None:
        """Refuses what cannot work, before any data are prepared, which may take hours, and writes nothing.

        Raises UserError.
        """
        device = workers.device
        self.config, self.workers = config, workers
        self.run = Path(config.runs_dir) / config.name
        self.schedule = Schedule(config.schedule, training_steps(config))
        self.recipe = choose_recipe(config.optimizer)
        check_tracking(config.tracking)
        self.precision = select_precision(config.precision, device)
        check_parallel(config, workers, self.precision)
        self.compiled = select_compile(config.compile, device)
        # Replay steps from CUDA graphs, if the model can be captured.
        self.capture = select_capture(
            config.capture, device, processes=workers.world_size, update_can_be=self.recipe.can_be_captured
        )
        set_deterministic(config.deterministic)  # which kernels have a say in
        self.plan = model_shapes(config, vocab_size=64)  # which no tokenizer falls below
        self.kernel = pin_execution(self.plan, config.attention, device=device, precision=self.precision, trains=True)
        self.writer = CheckpointWriter(
            self.run / "checkpoints", keep=config.checkpoints.keep, background=config.checkpoints.background
        )
        self.guard = Guard(
            skip=config.on_nonfinite == "skip", sigma=config.spikes.sigma, window=config.spikes.window, limit=config.skip_limit
        )
        self.interruption = Interruption()
        # As a run begins; a checkpoint says otherwise.
        self.first_step = 1
        self.seconds_before = 0.0
        self.metrics_bytes = 0
        self.wandb_id: str | None = None  # known once a tracker has been opened
        self.initial_tokens = 0  # behind the weights that it began with
        self.last_step: Step | None = None  # of a run killed after its last checkpoint only its summary is left to write
        self.evaluation_due = False  # of last_step, which was interrupted before it was evaluated
        self.best: tuple[int, float] | None = None  # the saved step that validated best, and its loss
        self.saved = 0  # the last step that was saved
        self.first_trained: Step | None = None  # of this session, the compilation in it: speed is counted after it
        self.timed_from: Step | None = None  # until it has been said how long the rest takes

    def open(self, data: PreparedData) -> None:
        """Build the model, load the newest checkpoint. Raises UserError for what the user can mend."""
        config, workers, device = self.config, self.workers, self.workers.device
        keep_freed_memory(device)
        checkpoint = workers.first(lambda: latest_checkpoint(self.run / "checkpoints", check_resumable))
        begins = initial_checkpoint(config, data) if checkpoint is None and config.init_from is not None else None
        self.data, self.tokenizer = data, data.tokenizer
        seed_everything(config.seed)
        self.model = build_model(config, data.vocab_size).to(device)
        compute_like(self.model, self.plan)
        self.facts = model_facts(self.model, config)
        self.micro_batch_size = config.micro_batch_size or auto_micro_batch_size(
            config.batch_size // workers.world_size,
            config.model,
            vocab_size=data.vocab_size,
            parameters=self.facts.parameters["total"],
            precision=self.precision,
            device=device,
        )
        self.model.loss_chunk_tokens = loss_chunk_tokens(device)
        self.engine = share_model(self.model, workers, config.parallel)
        alone_on_cuda = device.type == "cuda" and workers.world_size == 1
        self.optimizer = build_optimizer(self.model, config.optimizer, recipe=self.recipe, capturable=alone_on_cuda)
        self.losses = token_losses(
            self.model,
            capture="off" if config.capture == "off" else "auto",
            precision=self.precision,
            device=device,
            processes=workers.world_size,
        )
        if begins is not None:
            assert config.init_from is not None
            self.initial_tokens = tokens_seen(Path(config.init_from))
            load_checkpoint(begins, model=self.model, optimizer=None)
            check_finite(self.model, begins.path)
        if checkpoint is not None:
            self._continue(checkpoint)
        workers.seed_apart(config.seed, self.first_step - 1)
        if data.tokenizer_file is not None and workers.is_first:
            with replacing(self.run / "tokenizer.json") as temporary:
                shutil.copyfile(data.tokenizer_file, temporary)
        reset_peak_memory(device)

    def _continue(self, checkpoint: Checkpoint) -> None:
        """From where the checkpoint was saved. Raises UserError when it is not here, or the run's data has changed."""
        config = self.config
        if not self.workers.is_first:
            if not checkpoint.path.exists():
                gone = f"{checkpoint.path} is not on this machine"
                raise UserError(f"{gone}: runs_dir must lie on a disk that all machines share")
            checkpoint = verified(checkpoint.path)  # as this machine sees it
        load_checkpoint(checkpoint, model=self.model, optimizer=self.optimizer)
        if not self.data.is_what(checkpoint.state.get("data_fingerprint")):
            raise other_data(config.dataset.name, self.run, ANEW)
        saved = SavedState.of(checkpoint)
        self.first_step, self.seconds_before, self.last_step = saved.step + 1, saved.seconds, saved.last_step
        self.metrics_bytes, self.wandb_id, self.saved = saved.metrics_bytes, saved.wandb_id, saved.step
        if saved.initial_tokens is not None:
            self.initial_tokens = saved.initial_tokens
        elif config.init_from is not None:
            self.initial_tokens = tokens_seen(Path(config.init_from))
        if saved.guard is not None and saved.warmup_steps is not None:
            self.schedule.warmup, self.evaluation_due = saved.warmup_steps, saved.evaluation_due
            self.best = None if saved.best is None else (int(saved.best[0]), saved.best[1])
            self.guard.restore(dataclasses.asdict(saved.guard))
        if self.workers.is_first:
            tidy(self.run / "checkpoints", newest=checkpoint.path, keep=config.checkpoints.keep)
            if self.best is not None and self.best[0] == self.saved and config.checkpoints.keep_best:
                self.writer.keep_as_best(self.saved)  # a kill may have come between the two

    @property
    def device(self) -> torch.device:
        return self.workers.device

    @property
    def tokens_per_step(self) -> int:
        return self.config.batch_size * self.config.model.max_seq_len

    def lines(self) -> list[str]:
        """What a person wants to know before waiting."""
        train_split, steps, processes = self.data.splits["train"], self.schedule.steps, self.workers.world_size
        remark = cache_remark(self.facts, self.config)
        return [
            f"run         {self.run}",
            f"dataset     {self.config.dataset.name}: {train_split.n_tokens:,} training tokens, vocabulary "
            f"{self.data.vocab_size:,} ({self.data.fingerprint[:12]})",
            *([initial_line(self.config)] if self.config.init_from is not None and self.first_step == 1 else []),
            *self.facts.lines(),
            *([remark] if remark else []),
            f"attention   {self.config.attention['name']}, kernel {self.kernel}; {self.device.type}, "
            f"{str(self.precision).removeprefix('torch.')}{', compiled' if self.compiled else ''}"
            + (", steps captured" if self.capture else "")
            + (f", {processes} processes ({self.config.parallel.name})" if processes > 1 else ""),
            f"budget      {steps:,} steps of {self.tokens_per_step:,} tokens, {steps * self.tokens_per_step:,} in all"
            + (f", from step {self.first_step}" if self.first_step > 1 else ""),
        ]

    def time_line(self, step: Step) -> str | None:
        """For people, once: how long the steps that are left will take, by the first ones that tell."""
        if step.number <= self.first_step + WARM_UP:  # these compile, warm up and are captured
            self.timed_from = step
        begun = self.timed_from
        if begun is None or step.seconds - begun.seconds < TIMED_SECONDS or step.number == self.schedule.steps:
            return None
        self.timed_from = None
        left = self.schedule.steps - step.number
        seconds = left * (step.seconds - begun.seconds) / (step.number - begun.number)
        return f"time        about {duration(seconds)} for the {left * self.tokens_per_step:,} tokens left, evaluation apart"

    def train(self) -> Iterator[Step]:
        """The remaining steps."""
        config = self.config
        batches = window_loader(config, self.data, self.workers).iterate(self.first_step - 1, device=self.device)
        step_by = (CapturedStep if self.capture else EagerStep)(
            self.engine,
            self.optimizer,
            micro_batch_size=self.micro_batch_size,
            grad_clip=config.optimizer.grad_clip,
            precision=self.precision,
            compile=self.compiled,
            device=self.device,
        )
        with contextlib.closing(batches):  # ends the prefetching thread
            try:
                for step in train(
                    step_by,
                    batches,
                    schedule=self.schedule,
                    first_step=self.first_step,
                    last_step=self.schedule.steps,
                    guard=self.guard,
                ):
                    self.writer.check()
                    self.first_trained = self.first_trained or step
                    self.last_step = step
                    yield step
            except NonFiniteError as error:
                raise NonFiniteError(f"{error}. {self._whereabouts(error)}", step=error.step, batch=error.batch) from None

    def stopping(self) -> bool:
        """Has any process been asked to stop? Asked by all at the same place, answered alike in all."""
        asked = self.interruption.signal
        votes = self.workers.total(np.array([float(asked == number) for number in SIGNALS]))
        if votes.any():
            self.interruption.signal = SIGNALS[int(votes.argmax())]
        return bool(votes.any())

    def poll(self) -> None:
        """Raises Interrupted when any process has been asked to stop."""
        self.stopping()
        self.interruption.poll()

    def evaluate(self) -> SplitResult | None:
        """The validation split, as eval_model.py would score it, up to evaluation.max_tokens; None when asked to stop."""
        share = Share(self.workers.rank, self.workers.world_size, self.workers.total)
        try:
            return validate(self.losses, self.config, self.data, self.tokenizer, share=share, poll=self.poll)
        except Interrupted:
            return None

    def remarks(self, step: Step) -> Iterator[str]:
        """Lines for people: how long the rest takes, what is said of this step, and what a skipped one has not learned from."""
        if (line := self.time_line(step)) is not None:
            yield line
        if step.remark is not None:
            yield f"step {step.number:,}: {step.remark}"
        if step.skipped is not None:
            yield f"step {step.number:,}: skipped, {step.skipped} ({self._documents(step.number)})"

    def _whereabouts(self, error: NonFiniteError) -> str:
        """Sentences: where the number first went wrong, in which documents, and what is left."""
        documents = self._documents(error.step)
        kept = f"The checkpoint of step {error.step - 1:,} is kept." if error.step > 1 else "Nothing was trained."
        if self.workers.world_size > 1:  # a part of a sharded model cannot be computed alone
            return f"The batch holds {documents}; one process alone would name the module. {kept}"
        place = locate(
            self.model, error.batch, micro_batch_size=self.micro_batch_size, precision=self.precision, device=self.device
        )
        first = (
            "Computed once more, every output and gradient of the step is finite"
            if place is None
            else f"The first number that is not finite is in {place.where}"
        )
        documents = documents if place is None else self._documents(error.step, place.rows)
        return f"{first} ({documents}). {kept}"

    def _documents(self, number: int, rows: list[int] | None = None) -> str:
        """The documents in a step's batch, or in some rows of it, by their numbers in the training split."""
        windows = window_loader(self.config, self.data).windows(number - 1)
        found = documents_in(
            windows if rows is None else windows[rows],
            max_seq_len=self.config.model.max_seq_len,
            document_starts=self.data.splits["train"].document_starts,
        )
        return f"{plural(len(found), 'document')} {some_of([*map(str, found)], 16)} of the training split"

    def step_metrics(self, step: Step) -> dict[str, float]:
        """One step as it is logged."""
        metrics = {
            "train/loss": step.loss,
            "train/lr": step.lr,
            "train/grad_norm": step.grad_norm,
            "speed/tokens_per_second": step.tokens_per_second,
            "memory/peak_bytes": peak_memory_bytes(self.device),
        }
        if self.guard.may_skip:
            metrics["train/skipped_steps"] = self.guard.skipped
        peak = peak_flops(self.device, self.precision)
        if peak is not None:
            flops_per_second = step.tokens_per_second * self.facts.flops_per_token
            metrics["speed/mfu"] = flops_per_second / (peak * self.workers.world_size)
        return metrics

    def mean_tokens_per_second(self, last: Step) -> float:
        """Over this session's steps but the first, which compiles and warms up."""
        first = self.first_trained
        if first is None or first.number == last.number:
            return last.tokens_per_second
        return (last.tokens - first.tokens) / (last.seconds - first.seconds)

    def save(self, step: Step, tracker: Tracker, result: SplitResult | None = None, *, evaluation_due: bool = False) -> None:
        """A checkpoint after this step: continuing from it repeats nothing.

        result: the step's evaluation, if it has one. evaluation_due: it should have one and has not.
        """
        improved = self._improves(step.number, result)
        state = {
            "step": step.number,
            "last_step": {key: _or_null(value) for key, value in dataclasses.asdict(step).items()},
            "seconds": self.seconds_before + step.seconds,
            "metrics_bytes": tracker.metrics_bytes,
            "wandb_id": self.wandb_id,
            "data_fingerprint": self.data.fingerprint,
            "warmup_steps": self.schedule.warmup,
            "initial_tokens": self.initial_tokens,
            "evaluation_due": evaluation_due,
            "best": self.best,
            "guard": self.guard.state(),
        }
        taken = snapshot(self.model, self.optimizer, state, keep=self.workers.is_first)
        if self.workers.is_first:
            self.writer.save(taken, is_best=improved)
        self.workers.seed_apart(self.config.seed, step.number)
        self.saved = step.number

    def evaluated_late(self, result: SplitResult) -> None:
        """The evaluation that was due when the checkpoint was written."""
        if self._improves(self.saved, result) and self.workers.is_first:
            self.writer.keep_as_best(self.saved)

    def _improves(self, number: int, result: SplitResult | None) -> bool:
        if result is None or (self.best is not None and result.loss >= self.best[1]):
            return False
        self.best = (number, result.loss)
        return self.config.checkpoints.keep_best

    @contextlib.contextmanager
    def saving(self, tracker: Tracker) -> Iterator[None]:
        """Inside, checkpoints are written; afterwards none is any more, and what went wrong in writing has been raised.

        Numbers that go wrong leave a checkpoint of the step before.
        """
        try:
            try:
                yield
            except NonFiniteError as error:
                if self.last_step is not None and self.last_step.number == error.step - 1 > self.saved:
                    self.save(self.last_step, tracker)
                self.writer.wait()
                raise
            except Interrupted:
                self.writer.wait()
                raise
            self.writer.wait()
        finally:
            self.writer.close()

    def open_tracker(self) -> Tracker:
        """metrics.jsonl, cut to where this session starts, and W&B if chosen; one that does nothing beside the first."""
        if not self.workers.is_first:
            return SilentTracker()
        if self.first_step == 1:
            self._keep_older_rows()
        run_config = dataclasses.asdict(self.config) | self.facts.record()
        tracker = open_run_tracker(
            self.config,
            self.config.tracking,
            self.run,
            run_config=run_config,
            run_id=self.wandb_id,
            metrics_bytes=self.metrics_bytes,
        )
        self.wandb_id = tracker.run_id
        tracker.summary(self.facts.record())  # known before the first step, and of runs that never end
        return tracker

    def _keep_older_rows(self) -> None:
        """Rows of so many steps that a checkpoint may have come after them are kept: this run starts anew without one."""
        metrics = self.run / "metrics.jsonl"
        try:
            rows = read_metrics(self.run)
        except UserError:  # not all of it is ours
            rows = [{"step": self.config.intervals.checkpoint}]
        if rows and rows[-1]["step"] >= self.config.intervals.checkpoint:
            kept = next(path for number in itertools.count(1) if not (path := self.run / f"metrics.{number}.jsonl").exists())
            metrics.rename(kept)
            tell(
                f"{self.run} has no checkpoint and starts anew; its rows up to step {rows[-1]['step']:,} are kept in "
                f"{kept.name}"
            )

    def summary(self, step: Step, result: SplitResult) -> RunSummary:
        """The content of summary.json: final validation figures and what they were reached with."""
        training = Training(
            steps=step.number,
            tokens=step.tokens,
            initial_tokens=self.initial_tokens,
            loss=_or_null(step.loss),
            tokens_per_second=_or_null(self.mean_tokens_per_second(step)),
            seconds=self.seconds_before + (0.0 if self.first_trained is None else step.seconds),
            skipped_steps=self.guard.skipped if self.guard.may_skip else None,
        )
        computation = Computation(
            self.device, self.precision, self.kernel, self.compiled, step.captured, self.workers.world_size
        )
        return run_summary(
            self.config, self.facts, self.data, result, training=training, computation=computation, wandb_id=self.wandb_id
        )


def _or_null(value: Any) -> Any:
    """JSON has no number that is not finite."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
