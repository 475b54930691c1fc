"""Runs that were really killed, with W&B offline and online: one W&B run, all rows, the final figures, one shape."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.config.places import ROOT
from harness.errors import UserError
from harness.tracking.wandb_sync import mark_sent, pending
from scripts import sync_wandb
from tests.support.forks import Forks, wait_for
from tests.support.micro import Workplace, rows_of_steps, summary_of
from tests.support.wandb_server import RecordedRun, WandbServer

OPTIONS = ("tracking=wandb", "intervals.log=1", "intervals.evaluate=20")


@pytest.fixture
def place(tmp_path: Path, own_home: Path) -> Workplace:
    return Workplace(tmp_path / "work")


def killed_when(forks: Forks, place: Workplace, seen: Callable[[Path], bool], *options: str) -> Path:
    """A training as a command of its own, killed by SIGKILL as soon as its folder looks like that."""
    run = place.runs / "run"
    overrides = place.overrides("name=run", *OPTIONS, *options)
    process = forks.start("train_model.py", *overrides, streams=[os.devnull] * 3, session=True)
    try:
        wait_for(lambda: seen(run), process, pause=0.005)
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # W&B's own process too
        process.wait(60)
    assert not (run / "summary.json").exists()
    return run


def has_rows(count: int) -> Callable[[Path], bool]:
    return lambda run: (run / "metrics.jsonl").is_file() and (run / "metrics.jsonl").read_bytes().count(b"\n") >= count


def sync(server: WandbServer, command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Types a command where it was said, with the server and a key in the environment."""
    environment = os.environ | server.environment
    return subprocess.run(command, shell=True, env=environment, cwd=folder, timeout=120, capture_output=True, text=True)


def assert_whole(recorded: RecordedRun, run: Path) -> None:
    summary = summary_of(run)
    assert recorded.history == rows_of_steps(run)
    final = ("perplexity", "bits_per_byte", "cache_bytes_per_token", "parameters", "training_flops_per_token")
    assert {key: recorded.summary[key] for key in final} == {key: summary[key] for key in final}
    assert recorded.summary["val/perplexity"] == summary["perplexity"]
    assert recorded.exit_code == 0


def test_offline_and_killed_a_run_arrives_whole_by_the_line_that_was_said(
    forks: Forks, place: Workplace, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place.folder)  # the line works from where it was said
    options = ("budget.steps=120", "intervals.checkpoint=20")
    killed_when(forks, place, lambda run: any(run.glob("checkpoints/step-*")) and has_rows(30)(run), *options)
    run = place.train("run", *OPTIONS, *options)
    assert place.evaluate("run=run", "tracking=wandb", "extras=[]") == 0
    said = re.findall(r"upload with: (.+)\n", capfd.readouterr().err)
    assert len(set(said)) == 1 and "sync_wandb.py" in said[0]
    assert len(list(run.glob("wandb/offline-run-*"))) == 3
    with WandbServer() as server:
        done = sync(server, said[0], place.folder)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.splitlines()[-1]) == {"uploaded": 1, "failed": []}
        assert_whole(server.only_run(), run)
        (figure,) = (key for key in server.only_run().summary if re.fullmatch(r"eval/local_sea_\w{6}/test/loss", key))
        assert server.only_run().summary[figure] > 0 and not pending(run)
        _, script, *arguments = shlex.split(said[0])
        again = forks.run(place.folder / script, *arguments, folder=place.folder, environment=server.environment)
        assert again.status == 0, again.errors
        assert_whole(server.only_run(), run)
        nothing = forks.run("scripts/sync_wandb.py", f"runs_dir={place.runs}")
        assert json.loads(nothing.output.splitlines()[-1]) == {"uploaded": 0, "failed": []}


def test_a_run_killed_before_its_first_checkpoint_leaves_no_second_run_in_wandb(
    forks: Forks, place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    with WandbServer() as server:
        server.serves(monkeypatch)
        options = ("budget.steps=60", "intervals.checkpoint=60")
        run = killed_when(forks, place, has_rows(4), *options)
        assert server.only_run() and not any(run.glob("checkpoints/step-*"))
        place.train("run", *OPTIONS, *options)
        recorded = server.only_run()
    assert [row["step"] for row in recorded.history] == list(range(61))
    assert recorded.exit_code == 0 and recorded.run_id == summary_of(run)["wandb_id"]


def test_rows_that_a_killed_process_had_not_sent_yet_are_sent_by_the_one_that_continues(
    forks: Forks, place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W&B's client sends every few seconds; a checkpoint lies before that, and training goes on behind it."""
    with WandbServer() as server:
        server.serves(monkeypatch)
        options = ("budget.steps=60", "intervals.checkpoint=20")
        server.trouble = lambda server: server.silent.set()
        run = killed_when(forks, place, lambda run: any(run.glob("checkpoints/step-*")), *options)
        assert server.only_run().history == []
        server.trouble = None
        server.silent.clear()
        place.train("run", *OPTIONS, *options)
        assert_whole(server.only_run(), run)


def test_constants_are_no_history_and_the_summary_has_one_shape_however_the_run_went(
    forks: Forks, place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = []
    for interrupted in (False, True):
        with WandbServer() as server:
            server.serves(monkeypatch)
            options = ("budget.steps=60", "intervals.checkpoint=20", f"overwrite={str(not interrupted).lower()}")
            if interrupted:
                killed_when(forks, place, lambda run: any(run.glob("checkpoints/step-*")), *options)
                run = place.train("run", *OPTIONS, *options)
            else:
                run = place.train("plain", *OPTIONS, *options)
            recorded = server.only_run()
        shapes.append({key: type(value) for key, value in recorded.summary.items() if not key.startswith("_")})
        varying = re.compile(r"step|tokens|(train|val|speed|memory)/\w+")
        assert all(varying.fullmatch(key) for row in recorded.history for key in row)
        constants = ("parameters", "training_flops_per_token", "cache_bytes_per_token", "cache_ratio_to_mha")
        summary = summary_of(run)
        for key in (*constants, "cache_bytes_by_context"):
            assert recorded.config[key] == recorded.summary[key] == summary[key]
        assert not any("formula" in key or key.startswith(("flops/", "cache/")) for key in recorded.summary)
    assert shapes[0] == shapes[1] and isinstance(recorded.summary["val/perplexity"], float)


def test_without_a_key_nothing_is_said_to_be_uploaded(forks: Forks, place: Workplace) -> None:
    run = place.train("run", *OPTIONS)
    done = forks.run("scripts/sync_wandb.py", str(run))
    assert done.status == 2 and "there is no API key" in done.errors and pending(run)


def test_runs_studies_and_their_runs_are_found_and_only_what_the_server_lacks_is_pending(tmp_path: Path) -> None:
    def part(folder: Path, name: str) -> Path:
        place = folder / "wandb" / name
        place.mkdir(parents=True)
        file = place / f"run-{name.rpartition('-')[2]}.wandb"
        file.touch()
        return file

    study, alone = tmp_path / "study", tmp_path / "alone"
    for run in (study / "arm", alone):
        run.mkdir(parents=True)
        (run / "config.yaml").touch()
    page = part(study, "offline-run-20260102_000000-aaaa")
    later, earlier = part(alone, "run-20260102_000000-bbbb"), part(alone, "offline-run-20260101_000000-bbbb")
    assert sync_wandb.tracked_folders(tmp_path) == [alone, study, study / "arm"]
    assert pending(study) == [page.parent] and pending(alone) == [earlier.parent] and pending(study / "arm") == []
    (later.parent / "unsent").touch()
    assert pending(alone) == [earlier.parent, later.parent]
    mark_sent(pending(alone))
    assert pending(alone) == []


def test_a_folder_without_anything_to_upload_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run, and nothing that was tracked"):
        sync_wandb.main([str(tmp_path)])


def test_an_upload_does_not_wait_for_torch() -> None:
    read = "import sys, scripts.sync_wandb, harness.runs.to_dashboard; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", read], cwd=ROOT, check=False).returncode == 0
