"""What a finished run says of itself: summary.json."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from harness.config.identity import setup_hash
from harness.config.schema import TrainConfig
from harness.data import PreparedData
from harness.data.tokenizer import tokenizer_fingerprint
from harness.evaluation.model_facts import ModelFacts
from harness.evaluation.perplexity import SplitResult
from harness.runs.provenance import commit, now
from harness.runs.records import RunSummary
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
        **result.scores(),
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
