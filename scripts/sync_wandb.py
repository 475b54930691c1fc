"""Upload what Weights & Biases lacks of runs: those tracked offline, and those whose server fell silent.

python scripts/sync_wandb.py                            every such run, study and comparison below runs/
python scripts/sync_wandb.py runs/A runs/B              these, by folder or name, whether they were tracked or not
python scripts/sync_wandb.py runs/STUDY                 a study's page and all of its runs

A run that was killed arrives whole: what W&B's client was writing then ends torn, so that rows and final figures come from
the run's own files. Done again, only what is new is sent. Needs an API key: wandb login, or WANDB_API_KEY.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.entry.bootstrap import enter_environment

enter_environment()

import json

from harness.config.places import ROOT, user_path
from harness.config.run_config import is_run, run_folders
from harness.config.schema import TrackingConfig
from harness.entry.cli import chosen_folders, parse_options, run_script
from harness.errors import UserError, tell
from harness.files.folders import refuse_links
from harness.files.text import visible
from harness.tracking.wandb_sync import is_tracked, known_id, mark_sent, parts_of, pending, upload


@dataclass
class SyncOptions:
    runs: Annotated[list[str], "which, written without runs=; none: all that W&B lacks something of"] = field(
        default_factory=list
    )
    runs_dir: Annotated[str, "where they are looked for"] = str(ROOT / "runs")


def main(arguments: list[str]) -> int:
    options = parse_options(SyncOptions, arguments, positional="runs")
    given = chosen_folders(options.runs, options.runs_dir)
    folders = [folder for path in given or [user_path(options.runs_dir)] for folder in tracked_folders(path)]
    if not given:
        folders = [folder for folder in folders if pending(folder)]
    elif not folders:
        raise UserError(
            f"{', '.join(map(str, given))}: no run, and nothing that was tracked by Weights & Biases: name the folder "
            "of a run, a study or a comparison"
        )
    sent: list[str] = []
    failed: list[str] = []
    for number, folder in enumerate(folders, start=1):
        print(f"[{number}/{len(folders)}] {visible(str(folder))}", flush=True)
        (sent if send(folder) else failed).append(str(folder))
    print(json.dumps({"uploaded": len(sent), "failed": failed}))
    if failed:
        raise UserError(f"{len(failed)} of {len(folders)} did not arrive whole, see above; the same command goes on with them")
    return 0


def tracked_folders(path: Path, levels: int = 2) -> list[Path]:
    """The folder itself, if it is a run or was tracked, and those below it: of runs/, the studies and their runs."""
    if is_run(path):
        return [path]
    below = [folder for folder in run_folders(path) if folder.is_dir()] if levels else []
    found = [found for folder in below for found in tracked_folders(folder, levels - 1)]
    return [*([path] if is_tracked(path) else []), *found]


def send(folder: Path) -> bool:
    """Upload a folder's parts, then, of a run, what they lack. Whether all of it arrived."""
    from harness.runs.to_dashboard import mirror

    refuse_links(folder, ["wandb"])
    parts = pending(folder)
    if not is_run(folder):
        if reason := upload(parts):
            tell(f"error: {reason}")
        return reason is None
    run_id = known_id(folder)
    if all(part.name.startswith("offline-") for part in parts_of(folder)):
        # The first one that is torn ends this: what it lacks and all that follows is in the run's own files, from which a
        # run that was ever online has been given what went before.
        upload([part for part in parts if part.name.endswith(f"-{run_id}")])
    arrived = mirror(folder, TrackingConfig(name="wandb"), run_id=run_id)
    if arrived:
        mark_sent(parts)
    return arrived


if __name__ == "__main__":
    run_script(main, description=__doc__, options=SyncOptions)
