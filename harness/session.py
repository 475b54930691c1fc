"""Everything one training run is made of, assembled from its configuration and its newest checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harness.build import build_model
from harness.config import load_run_config, setup_hash
from harness.data import PreparedData, Tokenizer, TokenSplit, prepare
from harness.data.loader import WindowLoader, documents_in
from harness.errors import UserError
from harness.evaluation.evaluate import evaluate_model
from harness.evaluation.perplexity import WHOLE, Share, SplitResult
from harness.facts import ModelFacts, cache_remark, estimated_seconds, model_facts
from harness.run import commit, finished, read_json
from harness.schema import TrackingConfig, TrainConfig
from harness.tracking import SilentTracker, Tracker, open_tracker
from harness.training.checkpoint import best_checkpoint, latest_checkpoint, load_checkpoint, snapshot, tidy
from harness.training.device import (
    auto_micro_batch_size,
    keep_freed_memory,
    peak_flops,
    peak_memory_bytes,
    reset_peak_memory,
    seed_everything,
    select_compile,
    select_precision,
    set_deterministic,
)
from harness.training.interruption import SIGNALS, Interrupted, Interruption
from harness.training.loop import Engine, Step, train
from harness.training.nonfinite import Guard, NonFiniteError, locate
from harness.training.optimizer import Optimizer, build_optimizer
from harness.training.parallel import Workers, share_model
from harness.training.schedule import build_schedule, warmup_steps
from harness.training.writer import CheckpointWriter
from modeling.attention import EXECUTION
from modeling.gpt import GPT
from modeling.kernels.attend import choose_backend
from modeling.kernels.latent_decode import check_kernel, check_widths

# Above this many bytes of float32 logits in one forward pass the loss is computed in pieces (modeling/loss.py): on a CPU
# small pieces stay in its caches, on a GPU the plain loss is faster as long as its logits fit.
WHOLE_LOGITS_BYTES = {"cpu": 0, "cuda": 16 * 2**30}
CHECKPOINTS = ("last", "best")
LOSS_CHUNK_TOKENS = {"cpu": 512, "cuda": 8192}


@dataclass
class Session:
    """A run ready for its next step. `first_step` is 1 for a fresh run."""

    config: TrainConfig
    run: Path
    data: PreparedData
    tokenizer: Tokenizer
    model: GPT
    facts: ModelFacts
    optimizer: Optimizer
    workers: Workers
    engine: Engine | None  # None: one process
    precision: torch.dtype
    compiled: bool
    kernel: str
    micro_batch_size: int  # of each process
    steps: int
    first_step: int
    seconds_before: float
    metrics_bytes: int
    wandb_id: str | None  # known once a tracker has been opened
    first_trained: Step | None  # of this session, the compilation in it: speed is counted after it
    last_step: Step | None  # of the checkpoint; a run killed after its last one has only its summary left to write
    writer: CheckpointWriter
    guard: Guard
    warmup_steps: int  # of the budget that the run began with
    interruption: Interruption = field(default_factory=Interruption)
    evaluation_due: bool = False  # of last_step, which was interrupted before it was evaluated
    best: tuple[int, float] | None = None  # the saved step that validated best, and its loss
    saved: int = 0  # the last step that was saved

    @property
    def device(self) -> torch.device:
        return self.workers.device

    @property
    def tokens_per_step(self) -> int:
        return self.config.batch_size * self.config.model.max_seq_len

    def lines(self) -> list[str]:
        """What a person wants to know before waiting."""
        train_split = self.data.splits["train"]
        remaining = (self.steps - self.first_step + 1) * self.tokens_per_step
        seconds = estimated_seconds(
            remaining * self.facts.flops_per_token / self.workers.world_size, device=self.device, dtype=self.precision,
            width=self.config.model.d_model,
        )  # fmt: skip
        remark = cache_remark(self.facts, self.config)
        return [
            f"run         {self.run}",
            f"dataset     {self.config.dataset.name}: {train_split.n_tokens:,} training tokens, vocabulary "
            f"{self.data.vocab_size:,} ({self.data.fingerprint[:12]})",
            *self.facts.lines(),
            *([remark] if remark else []),
            f"attention   {self.config.attention['name']}, kernel {self.kernel}; {self.device.type}, "
            f"{str(self.precision).removeprefix('torch.')}{', compiled' if self.compiled else ''}"
            + (f", {self.workers.world_size} processes ({self.config.parallel.name})" if self.engine else ""),
            f"budget      {self.steps:,} steps of {self.tokens_per_step:,} tokens, {self.steps * self.tokens_per_step:,} "
            f"in all" + (f", from step {self.first_step}" if self.first_step > 1 else ""),
            f"time        about {_duration(seconds)} for {remaining:,} tokens, evaluation apart",
        ]

    def train(self) -> Iterator[Step]:
        """The remaining steps."""
        config = self.config
        batches = window_loader(config, self.data, self.workers).iterate(self.first_step - 1, device=self.device)
        schedule = build_schedule(config.schedule, self.steps, warmup=self.warmup_steps)
        with contextlib.closing(batches):  # ends the prefetching thread
            try:
                for step in train(
                    self.model, batches, optimizer=self.optimizer, schedule=schedule, first_step=self.first_step,
                    last_step=self.steps, micro_batch_size=self.micro_batch_size, grad_clip=config.optimizer.grad_clip,
                    precision=self.precision, compile=self.compiled, device=self.device, guard=self.guard,
                    engine=self.engine,
                ):  # fmt: skip
                    self.writer.check()
                    self.first_trained = self.first_trained or step
                    self.last_step = step
                    yield step
            except NonFiniteError as error:
                raise NonFiniteError(
                    f"{error}. {self._whereabouts(error)}", step=error.step, batch=error.batch
                ) from None

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
            return validate(
                self.model, self.config, self.data, self.tokenizer, precision=self.precision, device=self.device,
                share=share, poll=self.poll,
            )  # fmt: skip
        except Interrupted:
            return None

    def skipped_line(self, step: Step) -> str:
        """For people: a step without an update, and what it would have learned from."""
        return f"step {step.number:,}: skipped, {step.skipped} ({self._documents(step.number)})"

    def _whereabouts(self, error: NonFiniteError) -> str:
        """Sentences: where the number first went wrong, in which documents, and what is left."""
        documents = self._documents(error.step)
        kept = f"The checkpoint of step {error.step - 1:,} is kept." if error.step > 1 else "Nothing was trained."
        if self.engine is not None:  # a part of a sharded model cannot be computed alone
            return f"The batch holds {documents}; one process alone would name the module. {kept}"
        place = locate(
            self.model, error.batch, micro_batch_size=self.micro_batch_size, precision=self.precision,
            device=self.device,
        )  # fmt: skip
        first = (
            "Computed once more, every output and gradient of the step is finite" if place is None
            else f"The first number that is not finite is in {place.where}"
        )  # fmt: skip
        documents = documents if place is None else self._documents(error.step, place.rows)
        return f"{first} ({documents}). {kept}"

    def _documents(self, number: int, rows: list[int] | None = None) -> str:
        """The documents in a step's batch, or in some rows of it, by their numbers in the training split."""
        windows = window_loader(self.config, self.data).windows(number - 1)
        found = documents_in(
            windows if rows is None else windows[rows], max_seq_len=self.config.model.max_seq_len,
            document_starts=self.data.splits["train"].document_starts,
        )  # fmt: skip
        shown = ", ".join(map(str, found[:16])) + (f" and {len(found) - 16} more" if len(found) > 16 else "")
        return f"document{'s' if len(found) > 1 else ''} {shown} of the training split"

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

    def save(
        self, step: Step, tracker: Tracker, result: SplitResult | None = None, *, evaluation_due: bool = False
    ) -> None:
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
            "warmup_steps": self.warmup_steps,
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
        run_config = dataclasses.asdict(self.config) | {"facts": dataclasses.asdict(self.facts)}
        tracker = open_run_tracker(
            self.config, self.config.tracking, self.run, run_config=run_config, run_id=self.wandb_id,
            metrics_bytes=self.metrics_bytes,
        )  # fmt: skip
        self.wandb_id = tracker.run_id
        return tracker

    def summary(self, step: Step, result: SplitResult) -> dict[str, Any]:
        """The content of summary.json: final validation figures and what they were reached with."""
        return run_summary(
            self.config, facts=self.facts, data=self.data, result=result, tokens=step.tokens, steps=step.number,
            train_loss=_or_null(step.loss), tokens_per_second=self.mean_tokens_per_second(step),
            seconds=self.seconds_before + (0.0 if self.first_trained is None else step.seconds), kernel=self.kernel,
            device=self.device, precision=self.precision, compiled=self.compiled, wandb_id=self.wandb_id,
            processes=self.workers.world_size,
        ) | ({"skipped_steps": self.guard.skipped} if self.guard.may_skip else {})  # fmt: skip


def validate(
    model: GPT, config: TrainConfig, data: PreparedData, tokenizer: Tokenizer, *, precision: torch.dtype,
    device: torch.device, progress: bool = False, share: Share = WHOLE, poll: Callable[[], None] = lambda: None,
) -> SplitResult:  # fmt: skip
    """The validation split as a run's configuration has it scored. share, poll: see evaluate_model.

    Raises UserError when the corpus has no such split.
    """
    evaluation = config.evaluation
    return evaluate_model(
        model, validation_split(config, data), end_of_text=data.end_of_text, decode=tokenizer.decode,
        stride_fraction=evaluation.stride_fraction, batch_size=evaluation.batch_size, precision=precision, device=device,
        max_tokens=evaluation.max_tokens, progress=progress, share=share, poll=poll,
    )  # fmt: skip


def validation_split(config: TrainConfig, data: PreparedData) -> TokenSplit:
    """Raises UserError when the corpus has none."""
    if "validation" not in data.splits:
        raise UserError(
            f"dataset={config.dataset.name} has no validation split; set dataset.validation_fraction above 0"
        )
    return data.splits["validation"]


def run_summary(
    config: TrainConfig, *, facts: ModelFacts, data: PreparedData, result: SplitResult, tokens: int, steps: int,
    train_loss: float | None, tokens_per_second: float | None, seconds: float, kernel: str, device: torch.device,
    precision: torch.dtype, compiled: bool, wandb_id: str | None, processes: int = 1,
) -> dict[str, Any]:  # fmt: skip
    """The content of summary.json. train_loss and tokens_per_second are None where nothing was trained."""
    return {
        "name": config.name,
        "attention": config.attention["name"],
        "model": config.model.name,
        "dataset": config.dataset.name,
        "seed": config.seed,
        "data_seed": config.data_seed,
        "parameters": facts.parameters["total"],
        "parameters_by_block": facts.parameters,
        "training_flops_per_token": facts.flops_per_token,
        "tokens": tokens,
        "initial_tokens": 0 if config.init_from is None else tokens_seen(Path(config.init_from)),
        "init_from": config.init_from,
        "steps": steps,
        "loss": result.loss,
        "perplexity": result.perplexity,
        "word_perplexity": result.word_perplexity,
        "bits_per_byte": result.bits_per_byte,
        "split": "validation",
        "evaluated_tokens": result.tokens,
        "per_document": False,
        "stride_fraction": config.evaluation.stride_fraction,
        "max_tokens": config.evaluation.max_tokens,
        "train_loss": train_loss,
        "cache_bytes_per_token": facts.cache_bytes_per_token,
        "cache_dtype": facts.cache_dtype,
        "cache_context": config.model.max_seq_len,
        "cache_bytes_at_context": facts.cache_bytes_at_context,
        "cache_elements_per_token_per_layer": facts.cache_elements_per_token_per_layer,
        "cache_ratio_to_mha": facts.cache_ratio_to_mha,
        "mha_cache_bytes_per_token": facts.mha_cache_bytes_per_token,
        "tokens_per_second": tokens_per_second,
        "seconds": seconds,
        "peak_memory_bytes": peak_memory_bytes(device),
        "setup_hash": setup_hash(config),
        "data_fingerprint": data.fingerprint,
        "tokenizer_fingerprint": tokenizer_fingerprint(data.tokenizer_file),
        "kernel": kernel,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "precision": str(precision).removeprefix("torch."),
        "compiled": compiled,
        "processes": processes,
        "torch": torch.__version__,
        "commit": commit(),
        "wandb_id": wandb_id,
    }


def tokens_seen(run: Path) -> int:
    """Tokens that a finished run's weights have been trained on, by that run and by those it started from; else 0."""
    if not finished(run):
        return 0
    summary = read_json(run / "summary.json")
    return int(summary["tokens"]) + int(summary.get("initial_tokens", 0))


def load_data(config: TrainConfig, *, verify: bool = False) -> PreparedData:
    """The run's tokens, prepared if absent, every byte of them checked with `verify`.

    Raises UserError when they cannot be trained on.
    """
    data = prepare(
        config.dataset, config.tokenizer, Path(config.data_dir), tokenizer_file=_initial_tokenizer(config), verify=verify
    )  # fmt: skip
    if "train" not in data.splits:
        raise UserError(f"dataset={config.dataset.name} has no training split; choose another dataset to train on")
    validation_split(config, data)
    window_loader(config, data)
    return data


def _initial_tokenizer(config: TrainConfig) -> Path | None:
    """The tokenizer of the run whose weights this one starts from, whatever text it goes on with."""
    if config.init_from is None or config.tokenizer.name == "bytes":
        return None
    return Path(config.init_from) / "tokenizer.json"


def load_initial_weights(config: TrainConfig, model: GPT) -> None:
    """The newest weights of the run that init_from names. Raises UserError when it has none, or they do not fit."""
    assert config.init_from is not None
    checkpoint = latest_checkpoint(Path(config.init_from) / "checkpoints")
    if checkpoint is None:
        raise UserError(f"init_from={config.init_from} holds no checkpoint to start from; train it first")
    load_checkpoint(checkpoint, model=model, optimizer=None)


def window_loader(config: TrainConfig, data: PreparedData, workers: Workers | None = None) -> WindowLoader:
    """The run's training batches, one process's share of them. Raises UserError for a split shorter than one window."""
    return WindowLoader(
        data.splits["train"].tokens, max_seq_len=config.model.max_seq_len, batch_size=config.batch_size,
        data_seed=config.data_seed, rank=workers.rank if workers else 0,
        world_size=workers.world_size if workers else 1,
    )  # fmt: skip


def open_session(config: TrainConfig, run: Path, data: PreparedData, workers: Workers, steps: int) -> Session:
    """Build the model, load the newest checkpoint. Raises UserError for what the user can mend."""
    device = workers.device
    set_deterministic(config.deterministic)
    keep_freed_memory(device)
    precision = select_precision(config.precision, device)
    seed_everything(config.seed)
    model = build_model(config, data.vocab_size).to(device)
    kernel = pin_execution(model, config.attention, device=device, precision=precision)
    facts = model_facts(model, config)
    micro_batch_size = config.micro_batch_size or auto_micro_batch_size(
        config.batch_size // workers.world_size, max_seq_len=config.model.max_seq_len, d_model=config.model.d_model,
        n_layers=config.model.n_layers, vocab_size=data.vocab_size, parameters=facts.parameters["total"],
        precision=precision, device=device,
    )  # fmt: skip
    choose_loss_chunk(model, micro_batch_size=micro_batch_size, device=device)

    engine = share_model(model, workers, config.parallel)
    optimizer = build_optimizer(model, config.optimizer)
    session = Session(
        config=config, run=run, data=data, tokenizer=Tokenizer.load(data.tokenizer_file), model=model, facts=facts,
        optimizer=optimizer, workers=workers, engine=engine, precision=precision,
        compiled=select_compile(config.compile, device), kernel=kernel, micro_batch_size=micro_batch_size, steps=steps,
        first_step=1, seconds_before=0.0,
        metrics_bytes=0, wandb_id=None, first_trained=None, last_step=None,
        writer=CheckpointWriter(
            run / "checkpoints", keep=config.checkpoints.keep, background=config.checkpoints.background
        ),
        guard=Guard(
            skip=config.on_nonfinite == "skip", sigma=config.spikes.sigma, window=config.spikes.window,
            limit=config.skip_limit,
        ),
        warmup_steps=warmup_steps(config.schedule, steps),
    )  # fmt: skip
    checkpoint = workers.first(lambda: latest_checkpoint(run / "checkpoints"))
    if checkpoint is None and config.init_from is not None:
        load_initial_weights(config, model)
    if checkpoint is not None:
        if not checkpoint.exists():
            raise UserError(f"{checkpoint} is not on this machine: runs_dir must lie on a disk that all machines share")
        state = load_checkpoint(checkpoint, model=model, optimizer=optimizer)
        if state.get("data_fingerprint") != data.fingerprint:
            raise UserError(
                f"the data of dataset={config.dataset.name} is not what {run} was started on; bring that data back, "
                f"or train anew with overwrite=true or another name=..."
            )
        try:
            _continue(session, state)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError):
            raise UserError(
                f"checkpoint {checkpoint} is damaged (state.json is not of a run): use another one"
            ) from None
        if workers.is_first:
            tidy(run / "checkpoints", newest=checkpoint, keep=config.checkpoints.keep)
            if session.best is not None and session.best[0] == session.saved and config.checkpoints.keep_best:
                session.writer.keep_as_best(session.saved)  # a kill may have come between the two
    workers.seed_apart(config.seed, session.first_step - 1)
    if data.tokenizer_file is not None and workers.is_first:
        aside = run / "tokenizer.json.tmp"
        aside.unlink(missing_ok=True)  # a link would lead the copy elsewhere
        shutil.copyfile(data.tokenizer_file, aside)
        aside.replace(run / "tokenizer.json")
    reset_peak_memory(device)
    return session


def _continue(session: Session, state: Mapping[str, Any]) -> None:
    """What a checkpoint knows of the run besides its tensors."""
    session.first_step, session.seconds_before = state["step"] + 1, state["seconds"]
    session.last_step = Step(**(state["last_step"] | _numbers(state["last_step"])))
    session.metrics_bytes, session.wandb_id = state["metrics_bytes"], state["wandb_id"]
    session.saved = state["step"]
    if "guard" in state:  # older checkpoints know nothing of what follows
        session.warmup_steps, session.evaluation_due = state["warmup_steps"], state["evaluation_due"]
        session.best = None if state["best"] is None else (int(state["best"][0]), float(state["best"][1]))
        session.guard.restore(state["guard"])


@dataclass
class TrainedModel:
    """A run's model as its newest checkpoint left it, in evaluation mode."""

    config: TrainConfig
    model: GPT
    tokenizer: Tokenizer
    tokenizer_file: Path | None  # None: plain bytes
    kernel: str
    checkpoint: str
    step: int


def load_trained(
    run: Path, *, device: torch.device, precision: torch.dtype, execution: Mapping[str, Any], which: str = "last"
) -> TrainedModel:
    """Rebuild the model from the configuration inside the run, computed as `execution` says (backend, decode, kernel).

    which: last, the newest checkpoint, or best, the one that validated best. Raises UserError when the run holds no such
    checkpoint, or when its variant cannot be computed so.
    """
    if which not in CHECKPOINTS:
        raise UserError(f"checkpoint={which} is unknown: choose last or best")
    config = load_run_config(run)
    tokenizer_file = run / "tokenizer.json" if config.tokenizer.name != "bytes" else None
    tokenizer = Tokenizer.load(tokenizer_file)
    # How it was computed in training says nothing of how it is used.
    plain = dataclasses.replace(config, attention=config.attention | EXECUTION)
    model = build_model(plain, tokenizer.vocab_size).to(device)
    checkpoint = (latest_checkpoint if which == "last" else best_checkpoint)(run / "checkpoints")
    if checkpoint is None:
        kept = "no checkpoint" if which == "last" else "no best checkpoint (checkpoints.keep_best)"
        raise UserError(f"{run} holds {kept}; the command that started it continues it, or trains it")
    state = load_checkpoint(checkpoint, model=model, optimizer=None)
    kernel = pin_execution(model, execution, device=device, precision=precision)
    return TrainedModel(config, model.eval(), tokenizer, tokenizer_file, kernel, checkpoint.name, state["step"])


def open_run_tracker(
    config: TrainConfig,
    tracking: TrackingConfig,
    run: Path,
    *,
    run_config: dict[str, Any],
    run_id: str | None,
    metrics_bytes: int | None,
) -> Tracker:
    """The tracker of a training run, first opened or continued: always the same project, name, group and tags.

    `tracking` of another command than the one that trains (an evaluation) says how to track and what to add. Without a
    tracking.group, runs of one dataset and model size share a group in W&B, whose dashboard has filters for the rest, and
    runs of one variant in trackio.
    """
    by_variant = tracking.name == "trackio"
    return open_tracker(
        _with_the_runs_own(tracking, config.tracking), run_dir=run, name=config.name, run_config=run_config,
        group=config.attention["name"] if by_variant else f"{config.dataset.name}-{config.model.name}", job_type="train",
        tags=[config.attention["name"], config.dataset.name, config.model.name], run_id=run_id,
        metrics_bytes=metrics_bytes,
    )  # fmt: skip


def _with_the_runs_own(tracking: TrackingConfig, own: TrackingConfig) -> TrackingConfig:
    """`tracking` where it says something, and what the run was trained with where it leaves its defaults."""
    return dataclasses.replace(
        tracking, project=own.project if tracking.project == TrackingConfig.project else tracking.project,
        entity=tracking.entity or own.entity, group=tracking.group or own.group, notes=tracking.notes or own.notes,
        tags=[*own.tags, *tracking.tags],
    )  # fmt: skip


def pin_execution(model: GPT, execution: Mapping[str, Any], *, device: torch.device, precision: torch.dtype) -> str:
    """Choose backend, decode path and decode kernel once, set them in every layer and return the backend's name.

    Raises UserError if one of them cannot run.
    """
    first = model.attentions[0]
    try:
        check_kernel(execution["kernel"], device)
        backend = choose_backend(
            execution["backend"], n_heads=first.n_heads, n_kv_heads=first.n_kv_heads, qk_width=first.qk_width,
            v_width=first.v_head_dim, dropout=first.dropout, device=device, dtype=precision,
        )  # fmt: skip
        model.set_execution(backend=backend, decode=execution["decode"], kernel=execution["kernel"])
        if execution["kernel"] == "triton":
            check_widths(first.kv_lora_rank, first.qk_rope_head_dim)
    except ValueError as error:
        raise UserError(str(error)) from None
    return backend


def decode_path(model: GPT, new_tokens: int | None = None) -> str:
    """How calls through the cache are computed, in words; with new_tokens, a call of so many tokens a row."""
    first = model.attentions[0]
    if first.decode_paths == ("auto",):
        return "keys and values as they are cached"
    absorbed = f"absorbed ({first.kernel} kernel)"
    if new_tokens is not None:
        return absorbed if first.absorbs(new_tokens) else "expanded"
    if first.decode == "auto" and first.absorbs(1):
        return f"{absorbed} up to {first.absorbs_up_to:,} new tokens a call, expanded above"
    return absorbed if first.absorbs(1) else "expanded"


def choose_loss_chunk(model: GPT, *, micro_batch_size: int, device: torch.device) -> None:
    """Whole logits or pieces, whichever WHOLE_LOGITS_BYTES says for this device."""
    logits_bytes = 4 * micro_batch_size * model.max_seq_len * model.head.weight.shape[0]
    chunked = logits_bytes > WHOLE_LOGITS_BYTES.get(device.type, 0)
    model.loss_chunk_tokens = LOSS_CHUNK_TOKENS.get(device.type, 1024) if chunked else None


def tokenizer_fingerprint(file: Path | None) -> str:
    """SHA-256 of a tokenizer.json; "bytes" where tokens are plain bytes."""
    return "bytes" if file is None else hashlib.sha256(file.read_bytes()).hexdigest()


def steps_due(number: int, last: int, interval: int) -> bool:
    """Is it time, at step `number`, for what happens every `interval` steps and at the end?"""
    return number % interval == 0 or number == last


def _or_null(value: Any) -> Any:
    """JSON has no number that is not finite."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(step: Mapping[str, Any]) -> dict[str, Any]:
    """The reverse, for what can be missing of a step that was skipped."""
    return {key: math.nan for key in ("loss", "grad_norm") if step[key] is None}


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} seconds"
    return f"{round(seconds / 60)} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
