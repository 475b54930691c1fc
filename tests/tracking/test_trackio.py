"""What tracking=trackio promises: the runs as their folders have them, on this machine alone, without harming a run.

Runs that need the package are skipped where it is absent; it stays an extra because it replaces a newer pillow.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import sqlite3
import subprocess
import sys
import threading  # noqa: F401  for the program that is watched
import time
from pathlib import Path
from typing import Any

import pytest

from harness.config.places import ROOT
from harness.config.schema import TrackingConfig
from harness.errors import UserError
from harness.tracking import Tracker, check_tracking, log_study, open_tracker
from scripts import show_runs
from tests.support.micro import Workplace, metrics_of, summary_of

needs_trackio = pytest.mark.skipif(
    importlib.util.find_spec("trackio") is None, reason="trackio is not installed: pip install -r requirements-extra.txt"
)


@pytest.fixture
def folder(trackio_folder: Path) -> Path:
    """TRACKIO_DIR of all tests, told apart by project."""
    return trackio_folder


@pytest.fixture
def project(request: pytest.FixtureRequest) -> str:
    return re.sub(r"[^a-z]+", "-", request.node.name)[:60].strip("-")


def track(run_dir: Path, project: str, **changes: Any) -> Tracker:
    arguments: dict[str, Any] = {
        "run_dir": run_dir,
        "name": run_dir.name,
        "run_config": {"attention": {"name": "mla", "rank": 64}, "seed": 0},
        "group": "mla",
        "job_type": "train",
        "tags": ["mla"],
        "run_id": None,
        "metrics_bytes": 0,
    }
    return open_tracker(TrackingConfig(name="trackio", project=project), **(arguments | changes))


def query(folder: Path, project: str, sql: str) -> list[tuple[Any, ...]]:
    with sqlite3.connect(folder / f"{project}.db") as database:
        return database.execute(sql).fetchall()


def mirrored(folder: Path, project: str, name: str) -> list[dict[str, Any]]:
    """A run's rows, as metrics.jsonl has them."""
    rows = query(folder, project, f"SELECT step, metrics FROM metrics WHERE run_name = '{name}' ORDER BY id")
    return [{"step": step, **json.loads(metrics)} for step, metrics in rows]


def configuration(folder: Path, project: str, name: str) -> dict[str, Any]:
    ((text,),) = query(folder, project, f"SELECT config FROM configs WHERE run_name = '{name}'")
    found: dict[str, Any] = json.loads(text)
    return found


def lines_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_without_the_package_it_is_refused_in_a_sentence_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)  # what Python itself does to say: there is no such module
    remedy = r"needs the package trackio: pip install -r requirements-extra\.txt"
    with pytest.raises(UserError, match=remedy):
        check_tracking(TrackingConfig(name="trackio"))
    place = Workplace(tmp_path / "place")
    with pytest.raises(UserError, match=remedy):
        place.train("run", "tracking=trackio")
    with pytest.raises(UserError, match=remedy):
        place.evaluate("tracking=trackio")
    with pytest.raises(UserError, match=remedy):
        show_runs.main([f"runs_dir={place.runs}"])
    assert not place.runs.exists() and not (place.folder / "data").exists()
    check_tracking(TrackingConfig(name="none"))


def test_a_missing_package_does_not_keep_a_finished_run_from_being_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Workplace(tmp_path)
    run = place.train("run")
    config = (run / "config.yaml").read_text()
    assert config.count("  name: none\n") == 1
    (run / "config.yaml").write_text(config.replace("  name: none\n", "  name: trackio\n"))
    monkeypatch.setitem(sys.modules, "trackio", None)  # what Python itself does to say: there is no such module
    assert place.evaluate("run=run", "split=validation") == 0


@needs_trackio
def test_every_row_arrives_while_the_run_goes_on(
    tmp_path: Path, folder: Path, project: str, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "a run"
    with track(run_dir, project) as tracker:
        tracker.log(0, 0, {"val/loss": 5.5})
        assert len(mirrored(folder, project, "a run")) == 1
        for step in range(1, 40):
            tracker.log(step, step * 256, {"train/loss": 5.0 / step})
        tracker.log(39, 39 * 256, {"val/loss": 2.5})
        tracker.summary({"loss": 2.5, "attention": "mla"})
        assert tracker.run_id is None
    *rows, last = mirrored(folder, project, "a run")
    assert rows == lines_of(run_dir) and last == {"step": 39, "tokens": 39 * 256}
    config = configuration(folder, project, "a run")
    assert (config["_Group"], config["attention.name"], config["attention.rank"]) == ("mla", "mla", 64)
    assert config["summary"] == {"loss": 2.5, "attention": "mla"}
    said = capfd.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    (command,) = re.findall(rf"trackio: a run: look at it with: (.+) show --project {project}\n", said.err)
    assert command.endswith(("trackio", "trackio.cli"))
    listed = subprocess.run(f"{command} list runs --project {project}", shell=True, capture_output=True, text=True)
    assert listed.returncode == 0 and "a run" in listed.stdout


@needs_trackio
def test_a_resumed_run_is_the_same_run_and_has_no_row_twice(tmp_path: Path, folder: Path, project: str) -> None:
    run_dir = tmp_path / "run"
    with track(run_dir, project) as first:
        first.log(1, 256, {"train/loss": 5.0})
        at_the_checkpoint = first.metrics_bytes
        first.log(2, 512, {"train/loss": 4.0})
        first.log(3, 768, {"train/loss": 3.0})
    times = query(folder, project, "SELECT step, timestamp FROM metrics WHERE step = 1")
    with track(run_dir, project, metrics_bytes=at_the_checkpoint) as second:
        second.log(2, 512, {"train/loss": 4.5})
    assert mirrored(folder, project, "run") == lines_of(run_dir)
    assert [row["step"] for row in lines_of(run_dir)] == [1, 2]
    assert len(query(folder, project, "SELECT DISTINCT run_id FROM metrics")) == 1
    assert query(folder, project, "SELECT step, timestamp FROM metrics WHERE step = 1") == times


@needs_trackio
def test_an_evaluation_adds_its_figures_to_the_run(tmp_path: Path, folder: Path, project: str) -> None:
    run_dir = tmp_path / "run"
    with track(run_dir, project, run_config={"seed": 0, "facts": {"parameters": 7}}) as tracker:
        tracker.log(1, 256, {"train/loss": 5.0})
        tracker.summary({"bits_per_byte": 2.0})
    for split, figure in (("validation", 1.5), ("test", 1.75), ("test", 1.875)):
        with track(run_dir, project, run_config={"seed": 0}, metrics_bytes=None) as tracker:
            tracker.summary({f"eval/books/{split}/bits_per_byte": figure})
    figures = {"eval/books/validation/bits_per_byte": 1.5, "eval/books/test/bits_per_byte": 1.875}
    assert mirrored(folder, project, "run") == [*lines_of(run_dir), {"step": 1, "tokens": 256} | figures]
    config = configuration(folder, project, "run")
    assert config["summary"] == {"bits_per_byte": 2.0} | figures and config["facts.parameters"] == 7
    with track(run_dir, project) as tracker:
        tracker.log(1, 256, {"train/loss": 3.0})
    assert mirrored(folder, project, "run") == lines_of(run_dir)
    assert configuration(folder, project, "run")["summary"] == {}


@needs_trackio
def test_runs_of_the_same_name_in_two_folders_are_two_runs(tmp_path: Path, folder: Path, project: str) -> None:
    for place in ("here", "there"):
        with track(tmp_path / place / "run", project) as tracker:
            tracker.log(1, 256, {"train/loss": 5.0})
    assert len(query(folder, project, "SELECT DISTINCT run_id FROM metrics")) == 2


@needs_trackio
def test_values_that_json_cannot_hold_do_no_harm(
    tmp_path: Path, folder: Path, project: str, capfd: pytest.CaptureFixture[str]
) -> None:
    for metrics_bytes in (0, None):  # None: the rows come from metrics.jsonl, where they are null
        with track(tmp_path / "run", project, metrics_bytes=metrics_bytes) as tracker:
            if metrics_bytes == 0:
                tracker.log(1, 256, {"val/loss": math.nan, "val/perplexity": math.inf, "train/loss": 1.0})
        ((text,),) = query(folder, project, "SELECT metrics FROM metrics")
        assert json.loads(text)["train/loss"] == 1.0
    assert "stopped" not in capfd.readouterr().err


@needs_trackio
def test_a_locked_database_costs_seconds_and_the_run_goes_on(
    tmp_path: Path, folder: Path, project: str, capfd: pytest.CaptureFixture[str]
) -> None:
    import fcntl

    tracker = track(tmp_path / "run", project)
    tracker.log(1, 256, {"train/loss": 5.0})
    time.sleep(1.1)  # rows are written at most once a second
    with (folder / f"{project}.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        started = time.monotonic()
        tracker.log(2, 512, {"train/loss": 4.0})
        tracker.log(3, 768, {"train/loss": 3.0})
        tracker.close()
    assert time.monotonic() - started < 20
    assert [row["step"] for row in lines_of(tmp_path / "run")] == [1, 2, 3]
    said = capfd.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and "this run goes on" in said.err


@needs_trackio
@pytest.mark.parametrize("fault", ["project", "network file system", "folder"])
def test_what_trackio_refuses_is_one_line_and_the_run_goes_on(
    fault: str, tmp_path: Path, project: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    if fault == "project":
        project = "registry-mine"
    elif fault == "network file system":
        monkeypatch.setenv("TRACKIO_STORAGE_MODE", "jsonl")  # what it does there by itself
    else:
        monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", Path("/proc/nowhere"))
    with track(tmp_path / "run", project) as tracker:
        tracker.log(1, 256, {"train/loss": 5.0})
    assert len(lines_of(tmp_path / "run")) == 1
    said = capfd.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert re.search("trackio: (not in use|stopped)", said.err)


WATCHED = """
import sys

reached = []

def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto", "subprocess.Popen"):
        reached.append((event, arguments))

sys.addaudithook(watch)
from tests.tracking.test_trackio import *

for metrics_bytes in (0, None):
    with track(Path({run_dir!r}), "watched", metrics_bytes=metrics_bytes) as tracker:
        if metrics_bytes == 0:
            tracker.log(1, 256, {{"train/loss": 5.0}})
        tracker.summary({{"loss": 5.0}})
assert reached == [], reached
assert os.environ["TRACKIO_SPACE_ID"] == "me/space"
assert threading.active_count() == 1
"""


@needs_trackio
def test_nothing_leaves_this_machine_whatever_the_environment_says(tmp_path: Path) -> None:
    remote = {
        "TRACKIO_SPACE_ID": "me/space",
        "TRACKIO_BUCKET_ID": "me/bucket",
        "TRACKIO_SERVER_URL": "http://127.0.0.1:9",
        "TRACKIO_DATASET_ID": "me/data",
        "SPACE_REPO_NAME": "space",
        "HF_TOKEN": "hf_" + "a" * 34,
    }
    process = subprocess.run(
        [sys.executable, "-c", WATCHED.format(run_dir=str(tmp_path / "run"))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | remote | {"TRACKIO_DIR": str(tmp_path / "trackio")},
        timeout=60,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout == "" and process.stderr.count("\n") == 2
    assert len(query(tmp_path / "trackio", "watched", "SELECT * FROM metrics")) == 2


@needs_trackio
def test_a_study_shows_its_table_its_pictures_and_its_page_once(
    tmp_path: Path, folder: Path, project: str, capfd: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    picture, page = tmp_path / "pareto.png", tmp_path / "report.html"
    Image.new("RGB", (4, 3), "orange").save(picture)
    page.write_text("<!doctype html><p>verdict</p>")
    for figure in (1.25, 1.5):
        log_study(
            TrackingConfig(name="trackio", project=project),
            study="cache",
            folder=tmp_path / "study",
            columns=["arm", "bits per byte", "cache"],
            rows=[["mla", figure, 640], ["mha", None, 2048]],
            images={"pareto": picture},
            html=page,
            scatter=("cache", "bits per byte"),
        )
    logged = {key: value for row in mirrored(folder, project, "cache") for key, value in row.items()}
    assert logged["results"]["_value"] == [
        {"arm": "mla", "bits per byte": 1.5, "cache": 640},
        {"arm": "mha", "bits per byte": None, "cache": 2048},
    ]
    assert (folder / "media" / logged["pareto"]["file_path"]).read_bytes() == picture.read_bytes()
    assert (folder / "media" / logged["report"]["file_path"]).read_text() == page.read_text()
    assert len(mirrored(folder, project, "cache")) == 3
    config = configuration(folder, project, "cache")
    assert (config["job_type"], config["_Group"], config["tags"]) == ("study", "cache", "cache")
    assert capfd.readouterr().err.count("\n") == 2


def validation_loss(row: dict[str, Any]) -> float:
    (found,) = (value for key, value in row.items() if key.startswith("eval/local_") and key.endswith("/validation/loss"))
    return float(found)


@needs_trackio
def test_a_training_is_grouped_by_its_variant_and_show_runs_brings_in_the_others(
    tmp_path: Path, folder: Path, project: str, capfd: pytest.CaptureFixture[str]
) -> None:
    place = Workplace(tmp_path)
    own = place.train("own", "tracking=trackio", f"tracking.project={project}", "attention=mla")
    assert place.evaluate("run=own", "split=validation", "tracking=trackio") == 0
    live = mirrored(folder, project, "own")
    assert live[:-1] == metrics_of(own) and validation_loss(live[-1]) > 0
    config = configuration(folder, project, "own")
    assert config["_Group"] == "mla" and config["summary"]["loss"] == summary_of(own)["loss"]

    other = place.train("other")
    assert place.evaluate("run=other", "split=validation") == 0
    before = {path: path.read_bytes() for path in place.runs.rglob("*") if path.is_file()}
    for _ in range(2):
        assert show_runs.main([f"runs_dir={place.runs}", f"project={project}"]) == 0
    assert {path: path.read_bytes() for path in place.runs.rglob("*") if path.is_file()} == before
    assert mirrored(folder, project, "own") == live
    rows = mirrored(folder, project, "other")
    assert rows[:-1] == metrics_of(other) and validation_loss(rows[-1]) > 0
    config = configuration(folder, project, "other")
    assert config["_Group"] == "mha" and config["model.d_model"] == 32
    assert json.loads(capfd.readouterr().out.splitlines()[-1])["runs"] == [str(other), str(own)]


@needs_trackio
def test_show_runs_says_when_there_is_nothing_to_show(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"runs_dir=.* holds no run; train one"):
        show_runs.main([f"runs_dir={tmp_path}"])
