"""What makes two commands the same run, and two runs the same setup."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.config.schema import DatasetConfig, TrainConfig
from harness.files.hashes import value_sha256
from harness.files.text import differing

# How a run is computed is not what it is: these may differ between two commands that mean the same run.
EXECUTION_FIELDS = (
    "name",
    "runs_dir",
    "data_dir",
    "device",
    "compile",
    "capture",
    "deterministic",
    "overwrite",
    "micro_batch_size",
    "intervals",
    "evaluation.batch_size",
    "tracking",
    "attention.backend",
    "attention.decode",
    "attention.kernel",
    "model.activation_checkpointing",
    "dataset.path",
    "checkpoints",
    "parallel",
    "init_data",
)
SEED_FIELDS = ("seed", "data_seed")
# Fields that came later and change nothing as long as they keep their defaults: the hash of a setup is what it was before.
LATER_FIELDS = {
    "on_nonfinite": "stop",
    "skip_limit": 10,
    "spikes.sigma": None,
    "spikes.window": 100,
    "init_setup": None,
    "model.vocab_size": None,
    "model.default_width_base": None,
    "optimizer.width_base": None,
}


def flat(container: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves by dotted path."""
    leaves: dict[str, Any] = {}
    for key, value in container.items():
        path = f"{prefix}{key}"
        leaves.update(flat(value, f"{path}.") if isinstance(value, Mapping) and value else {path: value})
    return leaves


def identity(config: TrainConfig) -> dict[str, Any]:
    """What makes two commands the same run: every field by dotted path, execution fields left out."""
    leaves = flat(dataclasses.asdict(config))
    # A local corpus is known by its place; any other dataset's content is pinned, wherever it lies.
    execution = [field for field in EXECUTION_FIELDS if field != "dataset.path" or config.dataset.source != "local"]
    if config.dataset.source != "synthetic":  # what such a corpus is made of says nothing of any other
        execution += [path for path in leaves if path.startswith("dataset.synthetic_")]
    return {
        path: value
        for path, value in leaves.items()
        if not any(path == field or path.startswith(f"{field}.") for field in execution)
    }


def shared_fields(config: TrainConfig) -> dict[str, Any]:
    """What all processes that train one run must have been given alike, by dotted path: all but places and tracking."""
    own = ("runs_dir", "data_dir", "tracking.")  # the first process writes and tracks; data is compared by its content
    return {path: value for path, value in flat(dataclasses.asdict(config)).items() if not path.startswith(own)}


def setup_hash(config: TrainConfig) -> str:
    """Twelve hex digits of the identity without the seeds: runs that differ by seed alone share it.

    Of a run that another one's weights begin, that one's setup counts, not its place.
    """
    later = LATER_FIELDS | later_options(config.attention["mechanism"])
    leaves = {
        path: value
        for path, value in identity(config).items()
        if path not in (*SEED_FIELDS, "init_from") and not (path in later and value == later[path])
    }
    return value_sha256(leaves)[:12]


def later_options(mechanism: str) -> dict[str, Any]:
    """By dotted path, the options that the mechanism's class has a default for: they came later than it did."""
    from harness.config.checks import variant_schema

    _, defaults = variant_schema(mechanism)
    return {f"attention.{name}": value for name, value in defaults.items()}


def origin_hash(origin: Any) -> str:
    """Twelve hex digits of what made weights that no training of this run did (JSON-able): its `init_setup`."""
    return value_sha256(origin)[:12]


def differences(
    mine: TrainConfig, theirs: TrainConfig, *, only: Sequence[str] | None = None, apart_from: Sequence[str] = ()
) -> list[str]:
    """Sentences naming each identity field in which two configurations differ; `only` groups of fields, if given."""
    return [
        sentence
        for path, sentence in differing(identity(theirs), identity(mine)).items()
        if path not in apart_from and (only is None or path.partition(".")[0] in only)
    ]


def corpus_name(dataset: DatasetConfig) -> str:
    """The dataset's name; of files of the user's, which all have one, also that of their folder and a digest of its path."""
    if dataset.source != "local" or not dataset.path:
        return dataset.name
    digest = hashlib.sha256(dataset.path.encode()).hexdigest()[:6]
    return f"{dataset.name}_{Path(dataset.path.rstrip('/')).stem}_{digest}"
