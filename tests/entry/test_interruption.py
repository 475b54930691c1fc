"""SIGTERM and SIGINT: the step in hand is finished and saved, the run says how it goes on, the status which signal it was."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.config.places import ROOT
from harness.entry.cli import pasteable, run_child
from tests.support.attempts import Killer, assert_equal_runs
from tests.support.forks import Forks, Started, wait_for
from tests.support.micro import Workplace, contents, json_lines, metrics_of
from tests.support.wandb_server import WandbServer

TERM, INT = int(signal.SIGTERM), int(signal.SIGINT)


def continuation(output: str) -> str:
    """The command line that an interrupted run or sweep names last, as it is pasted into a shell."""
    lines = output.splitlines()
    (*_, place) = (i for i, line in enumerate(lines) if line.endswith("continue with") or line.endswith("continue it with"))
    return lines[place + 1]


def newest(run: Path) -> str:
    return max((path.name for path in run.glob("checkpoints/step-*")), default="none")


# Evaluations take three batches each: at steps 0, 3, 6, 9 and 10.
@pytest.mark.parametrize(("number", "background"), [(TERM, "true"), (INT, "false")])
@pytest.mark.parametrize(
    ("where", "n", "step"),
    [
        ("step", 1, 1),
        ("step", 3, 3),
        ("step", 5, 5),
        ("step", 6, 6),
        ("evaluation", 2, 0),
        ("evaluation", 5, 3),
        ("evaluation", 9, 6),
        ("evaluation", 13, 10),
        ("evaluation", 15, 10),
        ("write", 1, 3),
    ],
)
def test_a_run_asked_to_stop_finishes_its_step_and_goes_on_as_if_nothing_had_happened(
    killer: Killer, tmp_path: Path, number: int, background: str, where: str, n: int, step: int
) -> None:
    name, how = f"{where}{n}-{number}", f"checkpoints.background={background}"
    run = killer.place.runs / name
    status = killer.attempt(name, how, signals=[where, n, [number]], output=str(tmp_path / "out"))["status"]
    assert status == 128 + number
    *_, last = (tmp_path / "out").read_text().splitlines()
    said = json.loads(last)
    at = said["step"]
    assert (said["status"], said["run"]) == ("interrupted", str(run))
    # A write happens beside the steps that follow it.
    assert at == step if where != "write" else at in (2, 3, 4)
    assert newest(run) == (f"step-{at:08}" if at else "none")
    assert not (run / "summary.json").exists()
    assert [line["step"] for line in metrics_of(run) if "train/loss" in line] == list(range(1, at + 1)) if at else True

    python, script, *overrides = shlex.split(continuation((tmp_path / "out").read_text()))
    assert (python, (Path.cwd() / script).resolve()) == ("python", ROOT / "train_model.py")
    assert overrides == killer.overrides(name, how)
    assert killer.attempt(name, how, after=60)["status"] == 0
    assert_equal_runs(run, killer.whole)


@pytest.mark.parametrize("numbers", [[TERM, TERM], [INT, INT], [INT, TERM]])
def test_a_second_signal_ends_it_at_once_and_loses_only_what_no_checkpoint_holds(killer: Killer, numbers: list[int]) -> None:
    name = f"twice-{numbers[0]}-{numbers[1]}"
    run = killer.place.runs / name
    answer = killer.attempt(name, "checkpoints.background=false", signals=["step", 6, numbers])
    assert answer["status"] == -numbers[1]
    assert newest(run) == "step-00000004"
    assert killer.attempt(name, "checkpoints.background=false", after=60)["status"] == 0
    assert_equal_runs(run, killer.whole)


def test_interrupted_before_its_first_step_a_command_that_overwrites_puts_the_old_run_back(
    killer: Killer, tmp_path: Path
) -> None:
    killer.attempt("old", after=60)
    before = contents(killer.place.runs / "old")
    answer = killer.attempt("old", "overwrite=true", "seed=1", signals=["evaluation", 2, [TERM]], output=str(tmp_path / "out"))
    assert answer["status"] == 143
    assert contents(killer.place.runs / "old") == before
    assert "overwrite=true" in continuation((tmp_path / "out").read_text())


def test_interrupted_after_its_first_step_a_command_that_overwrites_goes_on_without_overwriting(
    killer: Killer, tmp_path: Path
) -> None:
    killer.attempt("older", "seed=1", after=60)
    output = str(tmp_path / "out")
    assert killer.attempt("older", "overwrite=true", signals=["step", 5, [TERM]], output=output)["status"] == 143
    assert "overwrite" not in continuation((tmp_path / "out").read_text())
    killer.attempt("older", after=60)
    assert_equal_runs(killer.place.runs / "older", killer.whole)


# --- as a command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def as_from_a_terminal() -> Iterator[None]:
    """SIGHUP means what it does there, though under nohup it is ignored and what is started inherits that."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def started(place: Workplace, forks: Forks, *arguments: str, **environment: str) -> Started:
    """train_model.py beside the test; what it prints and says is in two files of the place."""
    streams = [os.devnull, place.folder / "output.txt", place.folder / "errors.txt"]
    for file in streams[1:]:
        Path(file).touch()
    return forks.start("train_model.py", *arguments, streams=streams, folder=place.folder, environment=environment)


def said_by(place: Workplace) -> tuple[str, str]:
    return (place.folder / "output.txt").read_text(), (place.folder / "errors.txt").read_text()


def last_step(run: Path) -> int:
    """Of a metrics.jsonl that is being written: its last line may be there in part."""
    path = run / "metrics.jsonl"
    whole = path.read_text().split("\n")[:-1] if path.exists() else []
    return json.loads(whole[-1])["step"] if whole else -1


def test_the_command_leaves_with_143_and_the_command_that_it_names_continues_it(tmp_path: Path, forks: Forks) -> None:
    place = Workplace(tmp_path / 'it\'s a "folder" réel')
    options = ["budget.steps=100000", "intervals.log=1", "intervals.evaluate=50", "intervals.checkpoint=50"]
    process = started(place, forks, *place.overrides("name=run", *options))
    run = place.runs / "run"
    wait_for(lambda: newest(run) != "none", process)
    process.send_signal(TERM)
    assert process.wait(60) == 143, said_by(place)
    out, _ = said_by(place)
    said = json.loads(out.splitlines()[-1])
    assert newest(run) == f"step-{said['step']:08}"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    again = subprocess.Popen(
        ["sh", "-c", f"exec {continuation(out)}"],
        cwd=place.folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PATH": path},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        process_group=0,
    )
    try:
        wait_for(lambda: last_step(run) > said["step"] + 5, again)
        again.send_signal(signal.SIGINT)
        out, err = again.communicate(timeout=60)
    finally:
        again.kill()  # a run goes on when nobody reads it any more
    assert again.returncode == 130, err
    assert "Traceback" not in err and f"from step {said['step'] + 1}" in out
    steps = [line["step"] for line in metrics_of(run) if "train/loss" in line]
    assert steps == list(range(1, json.loads(out.splitlines()[-1])["step"] + 1))


def test_ctrl_c_which_reaches_the_process_of_wandb_too_loses_no_row_there(tmp_path: Path, forks: Forks) -> None:
    place = Workplace(tmp_path)
    with WandbServer() as server:
        online = server.environment | {"HOME": str(tmp_path)}
        options = ["name=run", "budget.steps=100000", "intervals.log=1", "tracking=wandb"]
        process = started(place, forks, *place.overrides(*options), **online)
        run = place.runs / "run"
        wait_for(lambda: last_step(run) > 10, process)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 130, said_by(place)
        recorded = server.only_run()
    out, _ = said_by(place)
    steps = list(range(json.loads(out.splitlines()[-1])["step"] + 1))
    assert [row["step"] for row in recorded.history] == steps
    assert recorded.exit_code == 1


# A run of a sweep, to which a signal comes as soon as it can take it.
RUN = """
import os, signal, sys, time
signal.signal({number}, lambda *_: sys.exit(7))
os.kill(os.getppid(), {number})
time.sleep(60)
"""


@pytest.mark.usefixtures("as_from_a_terminal")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_sweep_passes_each_signal_on_and_waits_for_its_run(number: signal.Signals) -> None:
    assert run_child([sys.executable, "-c", RUN.format(number=int(number))]) == (7, number)


def test_a_sweep_that_is_asked_to_stop_starts_no_other_run_and_says_how_it_goes_on(tmp_path: Path, forks: Forks) -> None:
    place = Workplace(tmp_path)
    options = ["budget.steps=100000", "intervals.log=1", "dataset.max_tokens=5000"]
    process = started(place, forks, "-m", *place.overrides("attention=mha,mla", *options))
    wait_for(lambda: any(last_step(file.parent) > 3 for file in place.runs.glob("*/metrics.jsonl")), process)
    process.send_signal(TERM)
    assert process.wait(60) == 143, said_by(place)
    out, err = said_by(place)
    (run,) = place.runs.glob("*/config.yaml")
    assert json_lines(out)[-1]["step"] == int(newest(run.parent).removeprefix("step-"))
    assert "Traceback" not in err
    python, script, *arguments = shlex.split(continuation(out))
    assert python.startswith("python") and (place.folder / script).resolve() == ROOT / "train_model.py"
    assert arguments == ["-m", *place.overrides("attention=mha,mla", *options)]


@pytest.mark.parametrize("name", ["python", "python3"])
def test_the_line_that_continues_begins_with_a_command_that_is_there(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Debian and macOS have no `python`."""
    (tmp_path / name).symlink_to(sys.executable)
    monkeypatch.setenv("PATH", str(tmp_path))
    line = pasteable(str(ROOT / "train_model.py"), ["attention=mha", "name=a b"])
    assert shlex.split(line) == [name, os.path.relpath(ROOT / "train_model.py"), "attention=mha", "name=a b"]
