"""What tracking promises: metrics.jsonl is whole whatever happens, W&B gets everything, and neither harms the run.

W&B's own client talks to a loopback server here, so that the online path is the real one.
"""

from __future__ import annotations

import json
import math
import os
import pty
import re
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.config.compose import load_eval_config, load_train_config
from harness.config.run_config import save_run_config
from harness.config.schema import TrackingConfig
from harness.runs.to_dashboard import open_run_tracker
from harness.tracking import Table, Tracker, log_study, open_tracker
from tests.support.forks import Forks
from tests.support.wandb_server import KEY, WandbServer


def track(run_dir: Path, config: TrackingConfig | None = None, **changes: Any) -> Tracker:
    arguments: dict[str, Any] = {
        "run_dir": run_dir,
        "name": "books-tiny-mla-seed0",
        "run_config": {"attention": {"name": "mla", "rank": 64}},
        "group": "books-tiny",
        "job_type": "train",
        "tags": ["mla"],
        "run_id": None,
        "metrics_bytes": 0,
    }
    return open_tracker(config or TrackingConfig(name="wandb"), **(arguments | changes))


def rows_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def children() -> list[str]:
    listed = subprocess.run(["ps", "-A", "-o", "ppid=,pid=,stat=,comm="], capture_output=True, text=True, check=True)
    fields = [line.split(maxsplit=3) for line in listed.stdout.splitlines()]
    return [
        f"{pid} {name}"
        for ppid, pid, state, name in fields
        if ppid == str(os.getpid()) and not state.startswith("Z") and name != "ps"
    ]


def obey(command: str, server: WandbServer, forks: Forks | None = None) -> None:
    """A command that was said, typed into a shell or, with `forks`, its words; with the server and a key in the environment."""
    with tempfile.TemporaryDirectory() as cache:
        environment = server.environment | {"WANDB_CACHE_DIR": cache, "TMPDIR": cache}
        if forks is None:
            subprocess.run(command, shell=True, env=os.environ | environment, check=True, timeout=120, capture_output=True)
        else:
            _, script, *arguments = shlex.split(command)
            done = forks.run(Path.cwd() / script, *arguments, folder=Path.cwd(), environment=environment)
            assert done.status == 0, done.errors


@pytest.fixture(autouse=True)
def home(tmp_path: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home folder without a key. Nothing may be left behind: processes, threads, variables, files outside the run."""
    monkeypatch.chdir(tmp_path)
    before, processes = set(threading.enumerate()), children()  # other tests' are there as long as the session
    yield own_home
    assert children() == processes
    until = time.monotonic() + 5  # a server's answer may outlive the question by a moment
    while set(threading.enumerate()) - before and time.monotonic() < until:
        time.sleep(0.02)
    assert set(threading.enumerate()) - before == set()
    assert "WANDB_SERVICE" not in os.environ and "WANDB_CACHE_DIR" not in os.environ
    assert {path.name for path in own_home.rglob("*")} <= {".netrc", ".config", "wandb", "settings"}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    """W&B, played; the environment points to it and holds a key."""
    with WandbServer() as server:
        server.serves(monkeypatch)
        yield server


def test_metrics_are_on_disk_line_by_line_without_wandb(tmp_path: Path) -> None:
    with track(tmp_path / "run", TrackingConfig(name="none")) as tracker:
        tracker.log(0, 0, {"val/loss": 5.5})
        assert rows_of(tmp_path / "run") == [{"step": 0, "tokens": 0, "val/loss": 5.5}]
        tracker.log(1, 256, {"train/loss": 5.25})
        tracker.summary({"loss": 5.25})
        assert len(rows_of(tmp_path / "run")) == 2
        assert tracker.run_id is None
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


def test_a_resumed_run_has_no_line_twice(tmp_path: Path) -> None:
    none = TrackingConfig(name="none")
    with track(tmp_path, none) as tracker:
        tracker.log(1, 256, {"train/loss": 5.0})
        at_the_checkpoint = tracker.metrics_bytes
        tracker.log(2, 512, {"train/loss": 4.0})
    with track(tmp_path, none, metrics_bytes=at_the_checkpoint, run_id="kept") as tracker:
        tracker.log(2, 512, {"train/loss": 4.0})
        assert tracker.run_id == "kept"
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2]
    with track(tmp_path, none) as tracker:
        tracker.log(1, 256, {"train/loss": 3.0})
    assert rows_of(tmp_path) == [{"step": 1, "tokens": 256, "train/loss": 3.0}]


def test_an_evaluation_leaves_metrics_alone(tmp_path: Path) -> None:
    none = TrackingConfig(name="none")
    with track(tmp_path, none) as tracker:
        tracker.log(1, 256, {"train/loss": 5.0})
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with track(tmp_path, none, metrics_bytes=None) as tracker:
        tracker.summary({"eval/books/test/loss": 4.5})
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("content", "size", "kept"),
    [
        ('{"step": 1}\n', 400, '{"step": 1}\n'),
        ('{"step": 1}\n{"st', 400, '{"step": 1}\n'),
        ("", 400, ""),
        ('{"st', 400, ""),
        ('{"step": 1}\n', 2**62, '{"step": 1}\n'),
        ('{"step": 1}\n{"step": 2}\n', 14, '{"step": 1}\n'),  # not the file that it was: a row ends elsewhere
    ],
)
def test_lost_metrics_are_said_and_what_is_there_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, size: int, kept: str
) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text(content)
    with track(tmp_path, TrackingConfig(name="none"), metrics_bytes=size) as tracker:
        tracker.log(3, 768, {"train/loss": 4.0})
        assert tracker.metrics_bytes == file.stat().st_size
    assert file.read_text() == kept + '{"step": 3, "tokens": 768, "train/loss": 4.0}\n'
    (said,) = capsys.readouterr().err.splitlines()
    assert f"it held {size:,} bytes when the checkpoint was written and holds {len(kept)} of whole rows now" in said
    assert not kept or 'the last of them {"step": 1}...' in said


def test_values_that_json_cannot_hold_become_null(tmp_path: Path) -> None:
    with track(tmp_path, TrackingConfig(name="none")) as tracker:
        tracker.log(1, 256, {"val/perplexity": math.inf, "val/loss": math.nan, "train/loss": 1.0})
    assert rows_of(tmp_path) == [{"step": 1, "tokens": 256, "val/perplexity": None, "val/loss": None, "train/loss": 1.0}]


def test_everything_arrives_online(tmp_path: Path, server: WandbServer, capfd: pytest.CaptureFixture[str]) -> None:
    config = TrackingConfig(name="wandb", project="ablation", tags=["night"], notes="a note")
    with track(tmp_path / "run", config) as tracker:
        tracker.log(0, 0, {"val/loss": 3.5, "cache/bytes_per_token": 640})
        for step in range(1, 40):
            tracker.log(step, step * 256, {"train/loss": 5.0 / step})
        tracker.log(39, 39 * 256, {"val/loss": 2.5})
        tracker.summary({"loss": 2.5, "cache_bytes_per_token": 640, "attention": "mla"})
    run = server.only_run()
    assert run.run_id == tracker.run_id
    assert (run.project, run.display_name, run.group, run.job_type, run.notes) == (
        "ablation",
        "books-tiny-mla-seed0",
        "books-tiny",
        "train",
        "a note",
    )
    assert run.tags == ["night", "mla"]
    assert run.config["attention"] == {"name": "mla", "rank": 64}
    *others, last, validation = rows_of(tmp_path / "run")
    assert run.history == [*others, last | validation]  # W&B has one row a step
    assert run.summary["loss"] == 2.5 and run.summary["cache_bytes_per_token"] == 640
    assert run.summary["val/loss"] == 2.5
    assert run.exit_code == 0
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines() == [f"wandb: {server.url}/tester/ablation/runs/{run.run_id}"]


def test_charts_are_drawn_over_tokens(tmp_path: Path, server: WandbServer) -> None:
    with track(tmp_path) as tracker:
        tracker.log(1, 256, {"val/loss": 5.0})
    # The client stores its metric definitions in the configuration under numbers: 1 name, 2 pattern, 5 the x-axis (an
    # index into the list, from 1).
    definitions = server.only_run().config["_wandb"]["m"]
    x_axis = next(number for number, entry in enumerate(definitions, start=1) if entry.get("1") == "tokens")
    assert {entry.get("1") or entry["2"]: entry.get("5") for entry in definitions if entry.get("1") != "tokens"} == {
        "*": x_axis
    }


def test_a_resumed_run_goes_on_in_the_same_wandb_run(tmp_path: Path, server: WandbServer) -> None:
    with track(tmp_path) as first:
        first.log(1, 256, {"train/loss": 5.0, "val/loss": 4.5})
        at_the_checkpoint = first.metrics_bytes
        first.log(2, 512, {"train/loss": 4.0})
        first.summary({"before": 1})
    with track(tmp_path, run_id=first.run_id, metrics_bytes=at_the_checkpoint) as second:
        for step in (2, 3):
            second.log(step, 256 * step, {"train/loss": 6.0 - step})
    with track(tmp_path, run_id=first.run_id, metrics_bytes=None, run_config={}) as evaluation:
        evaluation.summary({"eval/books/test/bits_per_byte": 1.9})
    assert first.run_id == second.run_id == evaluation.run_id
    run = server.only_run()
    assert run.history == rows_of(tmp_path)
    assert [row["step"] for row in run.history] == [1, 2, 3]
    assert run.summary["before"] == 1 and run.summary["val/loss"] == 4.5
    assert run.summary["eval/books/test/bits_per_byte"] == 1.9
    assert run.config["attention"] == {"name": "mla", "rank": 64}


def test_a_table_and_an_image_arrive(tmp_path: Path, server: WandbServer) -> None:
    from PIL import Image

    Image.new("RGB", (4, 3), "orange").save(tmp_path / "picture.png")
    with track(tmp_path / "run", metrics_bytes=None, job_type="compare") as tracker:
        table = Table(["variant", "bits per byte"], [["mla", 1.5], ["mha", 1.25]])
        tracker.mirror(lambda dashboard: dashboard.table("results", table))
        tracker.mirror(lambda dashboard: dashboard.image("scatter", tmp_path / "picture.png", caption="a caption"))
    run = server.only_run()
    logged = {key: value for row in run.history for key, value in row.items()}
    sent = json.loads(run.files[logged["results"]["path"]])
    assert sent["columns"] == ["variant", "bits per byte"] and sent["data"] == [["mla", 1.5], ["mha", 1.25]]
    assert run.files[logged["scatter"]["path"]] == (tmp_path / "picture.png").read_bytes()
    assert run.job_type == "compare"


def test_a_failed_run_is_marked_as_failed(tmp_path: Path, server: WandbServer) -> None:
    with pytest.raises(ZeroDivisionError), track(tmp_path) as tracker:
        tracker.log(1, 256, {"train/loss": 1 / 0})
    assert server.only_run().exit_code == 1


def test_the_environment_decides_where_a_run_goes(tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in {
        "WANDB_PROJECT": "theirs",
        "WANDB_ENTITY": "team",
        "WANDB_RUN_GROUP": "a group",
        "WANDB_NAME": "a name",
        "WANDB_TAGS": "one,two",
        "WANDB_NOTES": "a note",
        "WANDB_DIR": str(tmp_path / "elsewhere"),
    }.items():
        monkeypatch.setenv(key, value)
    (tmp_path / "elsewhere").mkdir()
    with track(tmp_path / "run", TrackingConfig(name="wandb", project="ours", entity="us", group="g", notes="n")):
        pass
    run = server.only_run()
    assert (run.project, run.entity, run.group, run.display_name, run.notes) == (
        "theirs",
        "team",
        "a group",
        "a name",
        "a note",
    )
    assert run.tags == ["one", "two", "mla"]
    assert (tmp_path / "elsewhere" / "wandb").is_dir() and not (tmp_path / "run" / "wandb").exists()


@pytest.mark.parametrize("place", ["netrc", "settings"])
def test_a_key_in_a_file_is_found(
    place: str, tmp_path: Path, home: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    if place == "netrc":
        (home / ".netrc").write_text(f"machine {server.url.removeprefix('http://')} login user password {KEY}\n")
        (home / ".netrc").chmod(0o600)
    else:
        monkeypatch.delenv("WANDB_BASE_URL")
        (home / ".config" / "wandb").mkdir(parents=True)
        (home / ".config" / "wandb" / "settings").write_text(f"[default]\nbase_url = {server.url}\napi_key = {KEY}\n")
    with track(tmp_path / "run") as tracker:
        tracker.log(1, 256, {"train/loss": 5.0})
    assert server.only_run().history == rows_of(tmp_path / "run")


def test_without_a_key_the_one_line_said_is_the_command_that_uploads(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "a run"
    run_dir.mkdir()
    save_run_config(load_train_config(["name=a", "dataset=wikitext2", "attention=mla"]), run_dir)
    with track(run_dir) as tracker:
        tracker.log(1, 256, {"train/loss": 5.0, "val/loss": 4.0})
        tracker.summary({"loss": 5.0})
    said = capfd.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and "there is no API key" in said.err
    with track(run_dir, run_id=tracker.run_id, metrics_bytes=(run_dir / "metrics.jsonl").stat().st_size) as tracker:
        tracker.log(2, 512, {"train/loss": 3.0})
    with track(run_dir, run_id=tracker.run_id, metrics_bytes=None, run_config={}) as tracker:
        tracker.summary({"eval/books/test/loss": 3.5})

    (command,) = re.findall(r"upload with: (.+)\n", said.err)
    with WandbServer() as server:
        obey(command, server)
        run = server.only_run()
    assert run.run_id == tracker.run_id and run.group == "wikitext2-tiny" and run.tags == ["mla", "wikitext2", "tiny"]
    assert run.history == rows_of(run_dir)
    assert run.config["attention"]["name"] == "mla" and run.config["attention"]["kv_lora_rank"] == 64
    expected = {"train/loss": 3.0, "val/loss": 4.0, "eval/books/test/loss": 3.5}
    assert {key: run.summary[key] for key in expected} == expected
    capfd.readouterr()


def test_nothing_is_ever_asked_on_a_terminal(tmp_path: Path, forks: Forks) -> None:
    program = tmp_path / "program.py"
    program.write_text(f"""
from tests.tracking.test_tracking import *

with track(Path({str(tmp_path / "run")!r})) as tracker:
    tracker.log(1, 256, {{"train/loss": 5.0}})
""")
    ours, theirs = pty.openpty()
    try:
        status = forks.start(program, streams=[os.ttyname(theirs)] * 3, session=True).wait(120)
        shown = os.read(ours, 65536).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    assert status == 0
    assert shown.count("\n") == 1 and "there is no API key" in shown


def test_wandb_is_off_or_offline_when_its_variable_says_so(
    tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with track(tmp_path / "off") as tracker:
        tracker.log(1, 256, {"train/loss": 5.0})
    assert [path.name for path in (tmp_path / "off").iterdir()] == ["metrics.jsonl"]
    assert capfd.readouterr() == ("", "")
    monkeypatch.setenv("WANDB_MODE", "offline")
    with track(tmp_path / "offline"):
        pass
    assert len(list((tmp_path / "offline" / "wandb").glob("offline-run-*"))) == 1
    assert server.runs == {}


def test_a_setting_that_wandb_does_not_take_is_said_in_one_line_with_what_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "nonsense")
    with track(tmp_path / "mode") as tracker:
        tracker.log(1, 256, {"train/loss": 5.0})
    said = capfd.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and "metrics.jsonl alone" in said.err
    for word in ("WANDB_MODE=nonsense", "online", "offline", "disabled", "dryrun"):
        assert word in said.err
    assert len(rows_of(tmp_path / "mode")) == 1
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "a while")
    with track(tmp_path / "timeout"):
        pass
    said = capfd.readouterr()
    assert said.err.count("\n") == 1 and "WANDB_INIT_TIMEOUT: input should be a valid number" in said.err


def test_a_missing_package_leaves_the_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # what Python itself does to say: there is no such module
    with track(tmp_path) as tracker:
        tracker.log(1, 256, {"train/loss": 5.0})
        tracker.summary({"loss": 5.0})
        assert tracker.run_id is None
    assert len(rows_of(tmp_path)) == 1
    assert capfd.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("fault", ["silent", "gone", "bad key"])
def test_a_server_that_cannot_be_reached_costs_seconds_and_the_run_goes_on_offline(
    fault: str, tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "2")
    if fault == "silent":
        server.silent.set()
    elif fault == "gone":
        server.close()
    else:
        monkeypatch.setenv("WANDB_API_KEY", "short")
    started = time.monotonic()
    with track(tmp_path) as tracker:
        tracker.log(1, 256, {"train/loss": 5.0})
    assert time.monotonic() - started < 10
    assert len(rows_of(tmp_path)) == 1 and server.runs == {}
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 1
    said = capfd.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and "offline" in said.err


def test_a_server_that_dies_in_mid_run_costs_seconds_and_loses_nothing(
    tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], forks: Forks
) -> None:
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "2")
    tracker = track(tmp_path)
    tracker.log(1, 256, {"train/loss": 5.0})
    server.close()
    for step in range(2, 200):
        tracker.log(step, 256 * step, {"train/loss": 5.0 / step})
    started = time.monotonic()
    tracker.close()
    assert time.monotonic() - started < 8
    said = capfd.readouterr()
    assert said.out == "" and said.err.count("\n") == 2
    (command,) = re.findall(r"upload the rest with: (.+)\n", said.err)
    save_run_config(load_train_config(["name=a", "dataset=wikitext2"]), tmp_path)
    with WandbServer() as revived:
        obey(command, revived, forks)
        assert revived.only_run().history == rows_of(tmp_path)
    assert len(rows_of(tmp_path)) == 199


@pytest.mark.parametrize("status", [401, 403])
def test_rows_that_the_server_refuses_in_mid_run_are_said_to_have_stayed_and_can_be_sent(
    status: int, tmp_path: Path, server: WandbServer, capfd: pytest.CaptureFixture[str], forks: Forks
) -> None:
    save_run_config(load_train_config(["name=a", "dataset=wikitext2"]), tmp_path)
    tracker = track(tmp_path)
    server.refusing = status
    for step in range(1, 20):
        tracker.log(step, 256 * step, {"train/loss": 5.0 / step})
    tracker.close()
    assert not tracker.arrived
    said = capfd.readouterr().err
    assert f"the server refused what was sent (status {status}), and rows stayed on this machine" in said
    (command,) = re.findall(r"upload them with: (.+)\n", said)
    server.refusing = 0
    obey(command, server, forks)
    assert server.only_run().history == rows_of(tmp_path)


def test_the_run_outlives_wandbs_own_process(tmp_path: Path, forks: Forks) -> None:
    program = tmp_path / "program.py"
    program.write_text(f"""
import signal
from tests.tracking.test_tracking import *

folder = Path({str(tmp_path)!r})
with track(folder / "first") as tracker:
    (service,) = children()
    os.kill(int(service.split()[0]), signal.SIGKILL)
    for step in range(1, 21):
        tracker.log(step, 256 * step, {{"train/loss": 5.0}})
        time.sleep(0.05)
with track(folder / "second") as tracker:
    tracker.log(1, 256, {{"train/loss": 5.0}})
assert children() == []
""")
    with tempfile.TemporaryDirectory() as temporary:  # a killed service leaves its socket there
        ended = forks.run(program, environment={"TMPDIR": temporary})
    assert ended.status == 0, ended.errors
    assert [row["step"] for row in rows_of(tmp_path / "first")] == list(range(1, 21))
    assert len(list((tmp_path / "second" / "wandb").glob("offline-run-*"))) == 1
    first, stopped, second = ended.errors.splitlines()
    assert "offline" in first and "this run goes on" in stopped and "offline" in second


def test_runs_in_one_process_do_not_meet(tmp_path: Path, server: WandbServer) -> None:
    for name in ("mha", "mla"):
        with track(tmp_path / name, name=name, run_config={"attention": name}, tags=[name]) as tracker:
            tracker.log(1, 256, {f"train/{name}": 1.0})
            tracker.summary({name: 1})
    mha, mla = server.runs.values()
    assert (mha.display_name, mla.display_name) == ("mha", "mla")
    assert mla.config["attention"] == "mla" and mla.tags == ["mla"] and "mha" not in mla.summary
    assert [set(run.history[0]) for run in (mha, mla)] == [{"step", "tokens", "train/mha"}, {"step", "tokens", "train/mla"}]


# --- studies: runs in groups, and the results ------------------------------------------------------------------------


def arm_runs(folder: Path) -> None:
    """A run of an arm: trained in part, continued, then evaluated by a command that says nothing of groups."""
    config = load_train_config(
        [
            "name=arm-seed3",
            "attention=mla",
            "dataset=wikitext2",
            "tracking.group=mla-64",
            "tracking.project=theirs",
            "tracking.tags=[cache, family]",
            "tracking.notes=one arm",
        ]
    )
    save_run_config(config, folder)
    run_id, metrics_bytes = None, 0
    for step in (1, 2):
        with open_run_tracker(
            config, config.tracking, folder, run_config={"seed": 3}, run_id=run_id, metrics_bytes=metrics_bytes
        ) as tracker:
            tracker.log(step, 256 * step, {"train/loss": 5.0 / step})
            run_id, metrics_bytes = tracker.run_id, tracker.metrics_bytes
    with open_run_tracker(
        config, load_eval_config([]).tracking, folder, run_config={"seed": 3}, run_id=run_id, metrics_bytes=None
    ) as tracker:
        tracker.summary({"eval/wikitext2/test/loss": 3.5})


def assert_in_its_arm(server: WandbServer, folder: Path) -> None:
    run = server.only_run()
    assert (run.project, run.group, run.job_type, run.display_name) == ("theirs", "mla-64", "train", "arm-seed3")
    assert run.tags == ["cache", "family", "mla", "wikitext2", "tiny"] and run.notes == "one arm"
    assert run.history == rows_of(folder) and run.summary["eval/wikitext2/test/loss"] == 3.5


def test_a_run_stays_in_its_arm_when_it_is_resumed_and_evaluated_online(tmp_path: Path, server: WandbServer) -> None:
    arm_runs(tmp_path)
    assert_in_its_arm(server, tmp_path)


def test_a_run_stays_in_its_arm_when_it_is_resumed_and_evaluated_offline(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], forks: Forks
) -> None:
    arm_runs(tmp_path)
    command, *_ = re.findall(r"upload with: (.+)\n", capfd.readouterr().err)
    with WandbServer() as server:
        obey(command, server, forks)
        assert_in_its_arm(server, tmp_path)


def test_an_evaluation_may_say_where_a_run_goes_and_add_tags(tmp_path: Path, server: WandbServer) -> None:
    config = load_train_config(["name=run", "dataset=wikitext2", "tracking.group=arm", "tracking.tags=[cache]"])
    chosen = load_eval_config(["tracking.group=other", "tracking.tags=[late]", "tracking.project=mine"]).tracking
    with open_run_tracker(config, chosen, tmp_path, run_config={}, run_id="abcd1234", metrics_bytes=None):
        pass
    run = server.only_run()
    assert (run.project, run.group) == ("mine", "other")
    assert run.tags == ["cache", "late", "mha", "wikitext2", "tiny"]


def test_runs_of_one_corpus_and_size_share_a_group_without_a_study(tmp_path: Path, server: WandbServer) -> None:
    for name, *corpus in (
        ("a", "dataset=wikitext2"),
        ("b", "dataset=local", f"dataset.path={tmp_path / 'novels'}"),
        ("c", "dataset=local", f"dataset.path={tmp_path / 'poems'}"),
    ):
        config = load_train_config([f"name={name}", "attention=mqa", *corpus])
        with open_run_tracker(config, config.tracking, tmp_path / name, run_config={}, run_id=None, metrics_bytes=0):
            pass
    groups = {run.display_name: run.group or "" for run in server.runs.values()}
    assert groups["a"] == "wikitext2-tiny"
    assert re.fullmatch(r"local_novels_\w{6}-tiny", groups["b"]) and re.fullmatch(r"local_poems_\w{6}-tiny", groups["c"])


def study_files(folder: Path) -> tuple[Path, Path]:
    from PIL import Image

    picture, page = folder / "pareto.png", folder / "report.html"
    Image.new("RGB", (4, 3), "orange").save(picture)
    page.write_text("<!doctype html><html><head></head><p>verdict: réef</p></html>")
    return picture, page


def log_results(folder: Path, picture: Path, page: Path, *, config: TrackingConfig | None = None, bpb: float = 1.5) -> None:
    log_study(
        config or TrackingConfig(name="wandb", tags=["family"]),
        study="cache",
        folder=folder,
        columns=["arm", "cache bytes", "bits per byte"],
        rows=[["mla", 640, bpb], ["mha", 2048, None], ["mqa", "?", 2]],
        images={"pareto": picture},
        html=page,
        scatter=("cache bytes", "bits per byte"),
    )


def test_a_studys_table_chart_picture_and_page_arrive_in_one_run(tmp_path: Path, server: WandbServer) -> None:
    picture, page = study_files(tmp_path)
    for bpb in (1.25, 1.5):
        log_results(tmp_path / "study", picture, page, bpb=bpb)
    run = server.only_run()
    assert (run.display_name, run.group, run.job_type) == ("cache", "cache", "study")
    assert run.tags == ["family", "cache"]
    assert run.exit_code == 0
    logged = {key: value for row in run.history for key, value in row.items()}
    table = json.loads(run.files[logged["results"]["path"]])
    assert table["columns"] == ["arm", "cache bytes", "bits per byte"]
    assert table["data"] == [["mla", 640, 1.5], ["mha", 2048, None], ["mqa", "?", 2]]
    assert run.files[logged["pareto"]["path"]] == picture.read_bytes()
    assert run.files[logged["report"]["path"]] == page.read_bytes()
    # A chart is a table and, in the configuration, the panel that draws two of its columns.
    chart = json.loads(run.files[logged["scatter_table"]["path"]])
    assert chart["data"] == table["data"]
    panel = run.config["_wandb"]["visualize"]["scatter"]["panel_config"]
    assert panel["panelDefId"] == "wandb/scatter/v0"
    assert panel["fieldSettings"] == {"x": "cache bytes", "y": "bits per byte"}


def test_a_study_can_be_uploaded_later(tmp_path: Path, capfd: pytest.CaptureFixture[str], forks: Forks) -> None:
    picture, page = study_files(tmp_path)
    log_results(tmp_path / "study", picture, page)
    said = capfd.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    (command,) = re.findall(r"upload with: (.+)\n", said.err)
    with WandbServer() as server:
        obey(command, server, forks)
        run = server.only_run()
    assert run.job_type == "study" and "scatter" in run.config["_wandb"]["visualize"]
    assert run.files[{**run.history[0], **run.history[-1]}["report"]["path"]] == page.read_bytes()


def test_a_study_does_nothing_without_tracking(tmp_path: Path) -> None:
    log_results(tmp_path / "study", tmp_path / "no.png", tmp_path / "no.html", config=TrackingConfig(name="none"))
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize("fault", ["missing file", "gone", "no such column", "folder"])
def test_a_study_that_cannot_be_logged_harms_nobody(
    fault: str, tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "2")
    picture, page = study_files(tmp_path)
    folder = tmp_path / "study"
    if fault == "missing file":
        page.unlink()
    elif fault == "gone":
        server.close()
    elif fault == "folder":
        folder.write_text("not a folder")
    columns = ["arm"] if fault == "no such column" else ["arm", "cache bytes", "bits per byte"]
    started = time.monotonic()
    log_study(
        TrackingConfig(name="wandb"),
        study="cache",
        folder=folder,
        columns=columns,
        rows=[["mla", 1, 2]],
        images={"pareto": picture},
        html=page,
        scatter=("cache bytes", "bits per byte"),
    )
    assert time.monotonic() - started < 10
    said = capfd.readouterr()
    assert said.out == ""
    expected = {"missing file": "stopped", "gone": "offline", "no such column": "stopped", "folder": "not in use"}
    assert expected[fault] in said.err.splitlines()[-1]
