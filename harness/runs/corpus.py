"""The text of a run that is there: found by what it is, never by where the run says that it lies.

Which runs somebody else made cannot be known, and a path in a configuration costs its author nothing. So no path in a run's
config.yaml is followed. What a run learned from is known by its fingerprint: prepared data of that fingerprint in the
user's own data_dir serves, and any other place is one that the user names.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from harness.config.schema import DatasetConfig, TrainConfig
from harness.data import PreparedData, Tokenizer, prepare, prepared_as
from harness.errors import UserError
from harness.runs.folder import finished
from harness.runs.records import read_summary
from harness.training.checkpoint import checkpoint_state, latest_checkpoint


def fingerprint_of(run: Path) -> str | None:
    """Of the data that a run learned from: its summary says, else its newest checkpoint. None where neither does."""
    if finished(run):
        known = read_summary(run).get("data_fingerprint")
    else:
        checkpoint = latest_checkpoint(run / "checkpoints")
        known = None if checkpoint is None else checkpoint_state(checkpoint).get("data_fingerprint")
    return known if isinstance(known, str) else None


def find_data(
    run: Path, dataset: DatasetConfig, data_dir: Path, *, tokenizer_file: Path | None, verify: bool = False
) -> PreparedData:
    """The prepared data in data_dir that a run learned from. Raises UserError where there is none."""
    fingerprint = fingerprint_of(run)
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


def data_of(
    run: Path, config: TrainConfig, data_dir: Path, *, path: str | None, tokenizer_file: Path | None, for_training: bool = False
) -> PreparedData:
    """The run's own corpus, in its own tokens. path: where it lies, as the user says; None: not said.

    Raises UserError where it is not to be had, or is not what the run was trained on.
    """
    dataset = dataclasses.replace(config.dataset, path=path)
    if path is None and config.dataset.path is not None:
        return find_data(run, config.dataset, data_dir, tokenizer_file=tokenizer_file)
    data = prepare(dataset, config.tokenizer, data_dir, tokenizer_file=tokenizer_file, for_training=for_training)
    if fingerprint_of(run) not in (None, data.fingerprint):
        raise UserError(
            f"the data of dataset={dataset.name} ({path or data.folder}) is not what {run} was trained on; bring that data "
            f"back, or name where it lies now with dataset.path=..."
        )
    return data
