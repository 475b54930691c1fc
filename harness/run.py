"""A run's folder: claimed by one configuration, finished when it holds summary.json.

<runs_dir>/<name>/  config.yaml  metrics.jsonl  tokenizer.json  checkpoints/  summary.json  evaluations/*.json
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.config import ROOT, differences, load_run_config, save_run_config
from harness.errors import UserError
from harness.schema import TrainConfig


def run_folder(config: TrainConfig) -> Path:
    """The folder that this run has or will have. Writes nothing.

    Raises UserError when the name is taken by a run of another configuration, naming what differs, or by something
    that is no run. A folder in which nothing has been logged yet is free: its command failed before the first step.
    """
    folder = Path(config.runs_dir) / config.name
    if not (folder / "config.yaml").is_file():
        if folder.is_dir() and any(folder.iterdir()):
            raise UserError(f"{folder} exists and is no run (it has no config.yaml): choose another name=...")
    elif not config.overwrite and ((folder / "metrics.jsonl").exists() or finished(folder)):
        differing = differences(config, load_run_config(folder))
        if differing:
            shown = "; ".join(differing[:4]) + (f"; and {len(differing) - 4} more" if len(differing) > 4 else "")
            raise UserError(
                f"the run {folder} exists with another configuration ({shown}): choose another name=..., or "
                f"overwrite=true to delete it and train anew"
            )
    return folder


def claim_run(config: TrainConfig) -> Path:
    """The run's folder, made if absent, with this configuration inside. Deletes an older run only if asked to overwrite.

    Raises UserError as `run_folder` does, and when the folder cannot be written.
    """
    folder = run_folder(config)
    if config.overwrite and folder.exists():
        aside = folder.with_name(f".{folder.name}.overwritten")
        if aside.exists():
            shutil.rmtree(aside)
        folder.rename(aside)
        shutil.rmtree(aside)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_run_config(config, folder)
    except OSError as error:
        raise UserError(f"the run's folder {folder} cannot be written ({error.strerror}): choose another runs_dir=...") \
            from None  # fmt: skip
    return folder


def finished(run: Path) -> bool:
    """Has this run been trained to its end?"""
    return (run / "summary.json").is_file()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises UserError when it is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}): delete it and run the command that wrote it again") \
            from None  # fmt: skip
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object: delete it and run the command that wrote it again")
    return value


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.tmp")
    aside.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(aside, path)


def commit() -> str | None:
    """The project's git commit, with '+changes' if files differ from it; None outside a checkout."""
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
        dirty = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")
