"""The text that a run trains on and is validated on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from harness.config.schema import TrainConfig
from harness.data import PreparedData, Tokenizer, TokenSplit, prepare
from harness.data.loader import WindowLoader
from harness.errors import UserError, tell
from harness.evaluation.evaluate import evaluate_model
from harness.evaluation.losses import TokenLosses
from harness.evaluation.perplexity import WHOLE, Scoring, Share, SplitResult
from harness.runs.corpus import find_data
from harness.runs.initial import brought
from harness.runs.records import read_summary
from harness.training.parallel import Workers


def load_data(config: TrainConfig, *, verify: bool = False) -> PreparedData:
    """The run's tokens, prepared if absent, every byte of them checked with `verify`.

    Raises UserError when they cannot be trained on.
    """
    source = brought(config)
    file = None if source is None or config.tokenizer.name == "bytes" else source / "tokenizer.json"
    data_dir = Path(config.data_dir)
    if source is not None and config.init_data and config.dataset.path is not None:
        data = find_data(source, config.dataset, data_dir, tokenizer_file=file, verify=verify)
    else:
        data = prepare(config.dataset, config.tokenizer, data_dir, tokenizer_file=file, verify=verify)
    if "train" not in data.splits:
        raise UserError(f"dataset={config.dataset.name} has no training split; choose another dataset to train on")
    validation_split(config, data)
    window_loader(config, data)
    return data


def load_shared(config: TrainConfig, workers: Workers, *, verify: Callable[[], bool]) -> PreparedData:
    """As `load_data`, in all processes: the first prepares it, and `verify` is asked there.

    Raises UserError when it is not the same for all of them, too.
    """
    opened: list[PreparedData] = []
    workers.first(lambda: opened.append(load_data(config, verify=verify())))
    data = opened[0] if opened else load_data(config)  # there by now, where the machines share a disk
    first = workers.first(lambda: data.fingerprint)
    is_other = workers.any(data.fingerprint != first)

    def refuse() -> None:
        if is_other:
            raise UserError(
                f"the data of dataset={config.dataset.name} in {config.data_dir} is not the same for all processes: copy the "
                f"first machine's to the others, or name a data_dir=... that they share"
            )

    workers.first(refuse)
    return data


def check_unchanged(config: TrainConfig, run: Path) -> None:
    """Raises UserError when the corpus of a finished run is no longer the text that it was trained on.

    A corpus that cannot be had (moved, out of reach) makes no run another one: that is said on stderr.
    """
    trained_on = read_summary(run).get("data_fingerprint")
    try:
        data = load_data(config)
    except UserError as error:
        tell(f"{run.name}: its data cannot be compared with what it was trained on ({error})")
        return
    if data.fingerprint != trained_on:
        raise other_data(config, run)


def other_data(config: TrainConfig, run: Path) -> UserError:
    return UserError(
        f"the data of dataset={config.dataset.name} is not what {run} was trained on; bring that data back, or train anew "
        f"with overwrite=true or another name=..."
    )


def window_loader(config: TrainConfig, data: PreparedData, workers: Workers | None = None) -> WindowLoader:
    """The run's training batches, one process's share of them. Raises UserError for a split shorter than one window."""
    return WindowLoader(
        data.splits["train"].tokens,
        max_seq_len=config.model.max_seq_len,
        batch_size=config.batch_size,
        data_seed=config.data_seed,
        rank=workers.rank if workers else 0,
        world_size=workers.world_size if workers else 1,
    )


def validation_split(config: TrainConfig, data: PreparedData) -> TokenSplit:
    """Raises UserError when the corpus has none."""
    if "validation" not in data.splits:
        raise UserError(f"dataset={config.dataset.name} has no validation split; set dataset.validation_fraction above 0")
    return data.splits["validation"]


def validate(
    losses: TokenLosses,
    config: TrainConfig,
    data: PreparedData,
    tokenizer: Tokenizer,
    *,
    progress: bool = False,
    share: Share = WHOLE,
    poll: Callable[[], None] = lambda: None,
) -> SplitResult:
    """The validation split as a run's configuration has it scored. share, poll: see evaluate_model.

    Raises UserError when the corpus has no such split.
    """
    scoring = Scoring(
        config.evaluation.stride_fraction,
        config.evaluation.batch_size,
        max_tokens=config.evaluation.max_tokens,
        progress=progress,
    )
    return evaluate_model(losses, validation_split(config, data), tokenizer, scoring, share=share, poll=poll)
