"""A run's config.yaml: written, found, and read as values, none of which is looked up anywhere."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness.config.checks import train_config
from harness.config.identity import flat
from harness.config.places import user_path
from harness.config.schema import TrainConfig
from harness.config.typed import did_you_mean
from harness.errors import UserError, in_a_line, readable
from harness.files.atomic import write_text
from harness.files.folders import listed
from harness.files.untrusted import Unreadable

_MOST_YAML, _MOST_DEPTH = 1 << 20, 20  # of a run's config.yaml: characters, groups within groups
_REMEDY = "restore it, or train the run anew"
# Overrides whose values are free text: they are quoted for Hydra, so that commas, spaces, '=' and brackets need none.
FREE_TEXT = (
    "name",
    "prompt",
    "path",
    "init_from",
    "run",
    "runs",
    "to",
    "source",
    "out",
    "dataset.path",
    "tokenizer.path",
    "runs_dir",
    "data_dir",
    "tracking.notes",
)


def run_folders(runs_dir: Path) -> list[Path]:
    """The folders in runs_dir that may be runs, by name; none where there is no such folder.

    Raises UserError where it may not be listed: what cannot be seen is not absent.
    """
    return [path for path in listed(runs_dir, f"runs_dir={runs_dir}") if not path.name.startswith(".")]


def is_run(folder: Path) -> bool:
    """Whether a run lies there. Raises UserError where that cannot be seen."""
    with readable(str(folder), "make it readable, or leave it out"):
        return (folder / "config.yaml").is_file()


def find_run(text: str, runs_dir: Path, field: str = "run") -> Path:
    """A run's folder from what was typed for `field`: a path, or the name of a run below runs_dir. Raises UserError."""
    with readable(f"{field}={text}", "make it readable, or name another run"):
        for candidate in (user_path(text, field), runs_dir / text):
            if (candidate / "config.yaml").is_file():
                return candidate
        known = [path.name for path in run_folders(runs_dir) if (path / "config.yaml").is_file()]
    hint = did_you_mean(Path(text).name, known) if known else "train one with python train_model.py"
    raise UserError(f"{field}={text} is no run (no config.yaml in it or in {runs_dir / text}); {hint}")


def read_run_config(run: Path) -> dict[str, Any]:
    """A run's config.yaml as it stands: values, none of which is looked up anywhere. Raises UserError, naming what is wrong.

    Whatever reads this file does it here: a run may have been sent, and `${oc.env:...}` in it would end in names, records
    and requests. Text that users write freely (paths, notes) may hold such signs, and they stay text.
    """
    import yaml

    path = run / "config.yaml"
    if not is_run(run):
        raise UserError(f"{run} holds no config.yaml, so it is not a run; name a folder that train_model.py wrote")
    try:
        text = path.read_bytes().decode("utf-8")
        _check_yaml(text)
        with _parsing():
            container = yaml.safe_load(text)  # OmegaConf would look `${...}` up, and takes minutes to read many of them
    except (OSError, UnicodeDecodeError, Unreadable) as error:
        raise UserError(f"{path} cannot be read ({in_a_line(error)}): {_REMEDY}") from None
    if not isinstance(container, dict):
        raise UserError(f"{path} is not a configuration of this version (it must be a group of fields): {_REMEDY}")
    for field, value in flat(container).items():
        if field not in FREE_TEXT and "${" in f"{field}{value}":
            raise UserError(
                f"{path}: {field} holds an interpolation, and a run's configuration is values alone, none of which is looked "
                f"up: write the value in its place"
            )
    return container


def load_run_config(run: Path) -> TrainConfig:
    """The configuration inside a run's folder. Raises UserError when there is none or it does not fit this version."""
    container = read_run_config(run)
    try:
        return train_config(container)
    except UserError as error:
        raise UserError(f"{run / 'config.yaml'} is not a configuration of this version ({error}): {_REMEDY}") from None


def _check_yaml(text: str) -> None:
    """Raises Unreadable for what no run's configuration holds and a few bytes of which cost all memory, or all stack."""
    import yaml

    if len(text) > _MOST_YAML:
        raise Unreadable(f"{len(text):,} characters are more than any run's configuration has")
    depth = 0
    for event in _events(text):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MOST_DEPTH:
            raise Unreadable("it is nested too deeply")
        if isinstance(event, yaml.NodeEvent) and (event.anchor is not None or getattr(event, "tag", None) is not None):
            raise Unreadable("it has an anchor, an alias or a tag")


def _events(text: str) -> Iterator[Any]:
    import yaml

    with _parsing():
        yield from yaml.parse(text, Loader=yaml.SafeLoader)


@contextlib.contextmanager
def _parsing() -> Iterator[None]:
    """What the library raises inside becomes Unreadable: a plain ValueError too, of numbers, days and characters that
    cannot be."""
    import yaml

    try:
        yield
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise Unreadable(in_a_line(error)) from None


def save_run_config(config: TrainConfig, run: Path) -> None:
    """Write <run>/config.yaml, whole or not at all."""
    from omegaconf import OmegaConf

    write_text(run / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config))))
