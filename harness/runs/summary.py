"""What a finished run says of itself: summary.json, and the same in a dashboard."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from harness.config.identity import corpus_name, setup_hash
from harness.config.schema import TrackingConfig, TrainConfig
from harness.data import PreparedData
from harness.data.tokenizer import tokenizer_fingerprint
from harness.evaluation.facts import ModelFacts
from harness.evaluation.perplexity import SplitResult
from harness.runs.provenance import commit, now
from harness.runs.records import RunSummary
from harness.tracking import Tracker, open_tracker
from harness.training.device import peak_memory_bytes


@dataclass(frozen=True)
class Computation:
    """How a model was computed."""

    device: torch.device
    precision: torch.dtype
    kernel: str
    compiled: bool = False
    captured: bool = False
    processes: int = 1

    @property
    def device_name(self) -> str:
        """Of the GPU, or the kind of device."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type

    @property
    def precision_name(self) -> str:
        """As precision= names it."""
        return str(self.precision).removeprefix("torch.")


@dataclass(frozen=True)
class Training:
    """What stands behind a run's weights. Of weights from elsewhere nothing is known but steps and tokens."""

    steps: int
    tokens: int
    initial_tokens: int = 0  # behind the weights that training began with
    loss: float | None = None  # of the last step
    tokens_per_second: float | None = None
    seconds: float = 0.0
    skipped_steps: int | None = None  # None: none may be skipped


def run_summary(
    config: TrainConfig,
    facts: ModelFacts,
    data: PreparedData,
    result: SplitResult,
    *,
    training: Training,
    computation: Computation,
    wandb_id: str | None,
) -> RunSummary:
    """The content of summary.json."""
    summary: RunSummary = {
        "name": config.name,
        "attention": config.attention["name"],
        "model": config.model.name,
        "dataset": config.dataset.name,
        "seed": config.seed,
        "data_seed": config.data_seed,
        **facts.record(),
        "tokens": training.tokens,
        "initial_tokens": training.initial_tokens,
        "init_from": config.init_from,
        "steps": training.steps,
        "loss": result.loss,
        "perplexity": result.perplexity,
        "word_perplexity": result.word_perplexity,
        "bits_per_byte": result.bits_per_byte,
        "split": "validation",
        "evaluated_tokens": result.tokens,
        "per_document": False,
        "stride_fraction": config.evaluation.stride_fraction,
        "max_tokens": config.evaluation.max_tokens,
        "train_loss": training.loss,
        "tokens_per_second": training.tokens_per_second,
        "seconds": training.seconds,
        "peak_memory_bytes": peak_memory_bytes(computation.device),
        "setup_hash": setup_hash(config),
        "data_fingerprint": data.fingerprint,
        "tokenizer_fingerprint": tokenizer_fingerprint(data.tokenizer_file),
        "kernel": computation.kernel,
        "device": computation.device_name,
        "precision": computation.precision_name,
        "compiled": computation.compiled,
        "captured": computation.captured,
        "processes": computation.processes,
        "torch": torch.__version__,
        "commit": commit(),
        "wandb_id": wandb_id,
        "finished_at": now(),
    }
    if training.skipped_steps is not None:
        summary["skipped_steps"] = training.skipped_steps
    return summary


def open_run_tracker(
    config: TrainConfig,
    tracking: TrackingConfig,
    run: Path,
    *,
    run_config: dict[str, Any],
    run_id: str | None,
    metrics_bytes: int | None,
    online: bool = False,
) -> Tracker:
    """The tracker of a training run, first opened or continued: always the same project, name, group and tags.

    `tracking` of another command than the one that trains (an evaluation) says how to track and what to add. Without a
    tracking.group, runs of one corpus and model size share a group in W&B, whose dashboard has filters for the rest, and
    runs of one variant in trackio.
    """
    corpus, variant = corpus_name(config.dataset), config.attention["name"]
    return open_tracker(
        _with_the_runs_own(tracking, config.tracking),
        run_dir=run,
        name=config.name,
        run_config=run_config,
        group=variant if tracking.name == "trackio" else f"{corpus}-{config.model.name}",
        job_type="train",
        tags=[variant, config.dataset.name, config.model.name],
        run_id=run_id,
        metrics_bytes=metrics_bytes,
        online=online,
    )


def _with_the_runs_own(tracking: TrackingConfig, own: TrackingConfig) -> TrackingConfig:
    """`tracking` where it says something, and what the run was trained with where it leaves its defaults."""
    return dataclasses.replace(
        tracking,
        project=own.project if tracking.project == TrackingConfig.project else tracking.project,
        entity=tracking.entity or own.entity,
        group=tracking.group or own.group,
        notes=tracking.notes or own.notes,
        tags=[*own.tags, *tracking.tags],
    )
