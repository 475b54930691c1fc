"""Where a run that starts from another one (init_from) has its weights, its tokenizer and its corpus from."""

from __future__ import annotations

from pathlib import Path

from harness.config.build import check_weights
from harness.config.identity import differences
from harness.config.run_config import load_run_config
from harness.config.schema import TrainConfig
from harness.data import PreparedData
from harness.errors import UserError
from harness.runs.folder import finished
from harness.runs.load import trained_checkpoint, trained_summary
from harness.runs.records import read_summary
from harness.training.checkpoint import Checkpoint


def tokens_seen(run: Path) -> int:
    """Tokens that a finished run's weights have been trained on, by that run and by those it started from; else 0."""
    if not finished(run):
        return 0
    summary = read_summary(run, "tokens")
    return int(summary["tokens"]) + int(summary.get("initial_tokens", 0))


def brought(config: TrainConfig) -> Path | None:
    """The folder with what init_from brings, a tokenizer and a corpus: this run's own once it has begun to train, for the
    source may be gone by then, and the source's before."""
    if config.init_from is None:
        return None
    run = Path(config.runs_dir) / config.name
    return run if not config.overwrite and any(run.glob("checkpoints/step-*")) else Path(config.init_from)


def initial_checkpoint(config: TrainConfig, data: PreparedData) -> Checkpoint:
    """The newest checkpoint of the run that init_from names.

    Raises UserError when it has none, when it is not of the size that its configuration says, or when the corpus that came
    with it has changed since.
    """
    assert config.init_from is not None
    source = Path(config.init_from)
    summary = trained_summary(source)
    checkpoint = trained_checkpoint(source, summary)
    if checkpoint is None:
        raise UserError(f"init_from={source} holds no checkpoint to start from; train it first")
    if not data.is_what(summary.get("data_fingerprint", data.fingerprint)) and not other_dataset(config):
        raise UserError(
            f"the data of dataset={config.dataset.name} ({config.dataset.path or data.folder}) is not what "
            f"init_from={source} was trained on; bring that data back, or keep the new text at another place and name "
            f"it (dataset=local dataset.path=...)"
        )
    check_weights(config, data.vocab_size, checkpoint.weights)
    return checkpoint


def other_dataset(config: TrainConfig) -> list[str]:
    """How the corpus differs from that of the run which init_from names, a sentence a field."""
    assert config.init_from is not None
    return differences(config, load_run_config(Path(config.init_from)), only=["dataset"])


def initial_line(config: TrainConfig) -> str:
    """For people: whose weights these are, and whether this text is the one that they have learned from."""
    assert config.init_from is not None
    start = f"weights     of {config.init_from}"
    other = other_dataset(config)
    return f"{start}, trained on another corpus than this run's ({other[0]})" if other else f"{start}, on its own corpus"
