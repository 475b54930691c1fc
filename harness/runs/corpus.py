"""The text of a run: that which it trains on and is validated on, and that of a run which is there.

Which runs somebody else made cannot be known, and a path in a configuration costs its author nothing. So no path in a run's
config.yaml is followed. What a run learned from is known by its fingerprint: prepared data of that fingerprint in the
user's own data_dir serves, and any other place is one that the user names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from harness.config.schema import DatasetConfig, TrainConfig
from harness.data import PreparedData, Tokenizer, VerifiedSplit, prepare, prepared_as
from harness.data.loader import WindowLoader
from harness.errors import UserError, tell
from harness.evaluation.evaluate import evaluate_model
from harness.evaluation.losses import TokenLosses
from harness.evaluation.perplexity import WHOLE, Scoring, Share, SplitResult
from harness.runs.folder import finished
from harness.runs.init_from import brought
from harness.runs.load import TrainedModel
from harness.runs.records import read_summary
from harness.training.checkpoint import latest_checkpoint
from harness.training.parallel import Workers


def load_data(config: TrainConfig, *, verify: bool = False) -> PreparedData:
    """The run's tokens, prepared if absent: every byte of the validation split is checked, with `verify` of all.

    Raises UserError when they cannot be trained on.
    """
    source = brought(config)
    file = None if source is None or config.tokenizer.name == "bytes" else source / "tokenizer.json"
    data_dir = Path(config.data_dir)
    if source is not None and config.init_data and config.dataset.path is not None:
        data = find_data(source, fingerprint_of(source), config.dataset, data_dir, tokenizer_file=file, verify=verify)
    else:
        data = prepare(config.dataset, config.tokenizer, data_dir, tokenizer_file=file, verify=verify)
    if "train" not in data.splits:
        raise UserError(f"dataset={config.dataset.name} has no training split; choose another dataset to train on")
    validation_split(config, data)
    window_loader(config, data)
    return data


def refuse_other_data(config: TrainConfig, data: PreparedData, workers: Workers) -> None:
    """Raises UserError when the data is not the same for all processes."""
    first = workers.first(lambda: data.fingerprint)
    is_other = workers.any(data.fingerprint != first)

    def refuse() -> None:
        if is_other:
            raise UserError(
                f"the data of dataset={config.dataset.name} in {config.data_dir} is not the same for all processes: copy the "
                f"first machine's to the others, or name a data_dir=... that they share"
            )

    workers.first(refuse)


def check_text_unchanged(config: TrainConfig, run: Path) -> None:
    """Raises UserError when the corpus of a finished run is no longer the text that it was trained on.

    A corpus that cannot be had (moved, out of reach) makes no run another one: that is said on stderr.
    """
    trained_on = read_summary(run).get("data_fingerprint")
    try:
        data = load_data(config)
    except UserError as error:
        tell(f"{run.name}: its data cannot be compared with what it was trained on ({error})")
        return
    if not data.is_what(trained_on):
        raise other_data(config.dataset.name, run, ANEW)


ANEW = "train anew with overwrite=true or another name=..."


def other_data(dataset: str, run: Path | str, remedy: str) -> UserError:
    return UserError(f"the data of dataset={dataset} is not what {run} was trained on; bring that data back, or {remedy}")


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


def validation_split(config: TrainConfig, data: PreparedData) -> VerifiedSplit:
    """Raises UserError when the corpus has none, or it is not whole."""
    if "validation" not in data.splits:
        raise UserError(f"dataset={config.dataset.name} has no validation split; set dataset.validation_fraction above 0")
    return data.verified("validation")


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


def fingerprint_of(run: Path) -> str | None:
    """Of the data that a run learned from: its summary says, else its newest checkpoint. None where neither does."""
    if finished(run):
        known = read_summary(run).get("data_fingerprint")
    else:
        checkpoint = latest_checkpoint(run / "checkpoints")
        known = None if checkpoint is None else checkpoint.state.get("data_fingerprint")
    return known if isinstance(known, str) else None


def find_data(
    run: Path,
    fingerprint: str | None,
    dataset: DatasetConfig,
    data_dir: Path,
    *,
    tokenizer_file: Path | None,
    verify: bool = False,
) -> PreparedData:
    """The prepared data in data_dir that a run learned from. Raises UserError where there is none."""
    data = None
    if fingerprint is not None:
        data = prepared_as(fingerprint, data_dir, tokenizer=Tokenizer.load(tokenizer_file).sha256, verify=verify)
    if data is None:
        raise UserError(
            (
                f"{run} does not say which data it was trained on"
                if fingerprint is None
                else f"data_dir={data_dir} holds nothing that is what {run} was trained on"
            )
            + f", and the path in a run's config.yaml ({dataset.path}) is not followed, since the run may be somebody else's: "
            f"name the text with dataset.path=..."
            + ("" if fingerprint is None else ", or the folder of its prepared data with data_dir=...")
        )
    return data


def data_of(trained: TrainedModel, data_dir: Path, *, path: str | None, for_training: bool = False) -> PreparedData:
    """The run's own corpus, in its own tokens. path: where it lies, as the user says; None: not said.

    Raises UserError where it is not to be had, or is not what the run was trained on.
    """
    run, config, tokenizer_file = trained.run, trained.config, trained.tokenizer_file
    dataset = dataclasses.replace(config.dataset, path=path)
    if path is None and config.dataset.path is not None:
        return find_data(run, trained.fingerprint, config.dataset, data_dir, tokenizer_file=tokenizer_file)
    data = prepare(dataset, config.tokenizer, data_dir, tokenizer_file=tokenizer_file, for_training=for_training)
    if trained.fingerprint is not None and not data.is_what(trained.fingerprint):
        raise other_data(f"{dataset.name} ({path or data.folder})", run, "name where it lies now with dataset.path=...")
    return data
