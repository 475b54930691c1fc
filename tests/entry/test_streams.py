"""Lost output is not lost training: closed streams, readers that leave, terminals that are closed, other encodings."""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from harness.config.places import ROOT
from tests.support.forks import Forks, Started, wait_for
from tests.support.micro import STEPS, Workplace, metrics_of, summary_of

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def line(script: str, *arguments: str) -> str:
    return shlex.join([sys.executable, str(ROOT / script), *arguments])


def shell(text: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A line for bash; `${PIPESTATUS[0]}` of it stands at the end of its standard error."""
    return subprocess.run(
        ["bash", "-c", f'{text}\necho "status ${{PIPESTATUS[0]}}" >&2'],
        cwd=folder,
        env=ENVIRONMENT | environment,
        text=True,
        capture_output=True,
        timeout=240,
    )


def assert_whole(run: Path, steps: int = STEPS) -> None:
    """Trained to its end, its last checkpoint and its summary there, every step logged."""
    assert summary_of(run)["steps"] == steps
    assert (run / "checkpoints" / f"step-{steps:08}").is_dir()
    assert metrics_of(run)[-1]["step"] == steps


def read_by(command: str, pipe: Path) -> subprocess.Popen[str]:
    """A reader of a pipe with a name, made for it."""
    os.mkfifo(pipe)
    return subprocess.Popen(f"{command} < '{pipe}'", shell=True, stdout=subprocess.PIPE, text=True)


# Where the output and the errors of a command go, and who reads the pipe; None: closed.
LOST: dict[str, tuple[str | None, str | None, str]] = {
    "stdout closed": (None, "errors", ""),
    "stderr closed": ("output", None, ""),
    "all closed": (None, None, ""),
    "reader leaves": ("pipe", "errors", "head -1"),
    "no reader, stderr too": ("pipe", "pipe", "true"),
    "full disk": ("/dev/full", "/dev/full", ""),
}


def ended(forks: Forks, folder: Path, how: str, script: str, *arguments: str) -> tuple[int, str, str]:
    """The status of a command whose output is lost like that, what its reader read, and what it said in `errors`."""
    output, errors, reads = LOST[how]
    (folder / "output").touch()
    (folder / "errors").touch()
    reader = read_by(reads, folder / "pipe") if reads else None
    streams = [None if how == "all closed" else os.devnull, output and folder / output, errors and folder / errors]
    status = forks.start(script, *arguments, streams=streams, folder=folder).wait(240)
    return status, reader.communicate()[0] if reader else "", (folder / "errors").read_text()


@pytest.mark.parametrize(("how", "sweep"), [*((how, "") for how in LOST), ("all closed", "-m"), ("reader leaves", "-m")])
def test_a_run_whose_lines_cannot_be_printed_goes_on_to_its_end(how: str, sweep: str, tmp_path: Path, forks: Forks) -> None:
    place = Workplace(tmp_path)
    arguments = [*filter(None, [sweep]), *place.overrides("name=run")]
    status, _, said = ended(forks, tmp_path, how, "train_model.py", *arguments)
    assert status == 0 and "Traceback" not in said and "error" not in said
    assert_whole(place.runs / "run")


def test_python_that_is_started_with_closed_streams_trains_to_the_end(tmp_path: Path) -> None:
    """As above from the very start: Python itself has no streams then."""
    place = Workplace(tmp_path)
    done = shell(f"{line('train_model.py', *place.overrides('name=run'))} <&- >&- 2>&-", tmp_path)
    assert done.stderr == "status 0\n"
    assert_whole(place.runs / "run")


def test_a_mistake_keeps_its_status_where_it_cannot_be_said(tmp_path: Path, forks: Forks) -> None:
    place = Workplace(tmp_path)
    assert ended(forks, tmp_path, "all closed", "train_model.py", *place.overrides("device=gpu"))[0] == 2
    assert not place.runs.exists()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    place = Workplace(tmp_path_factory.mktemp("shared"))
    place.train("run")
    place.train("long", "model.max_seq_len=4096", "budget.steps=1", "batch_size=1", "evaluation.max_tokens=100")
    return place


def commands(place: Workplace, out: Path) -> dict[str, tuple[str, list[str], Path]]:
    """Script, arguments, and a file that the command leaves when it goes on to its end."""
    where = f"runs_dir={place.runs}"
    exact = [f"data_dir={place.folder / 'data'}", "method=exact", "device=cpu"]
    small = ["contexts=8", "batch_sizes=1", "steps=1", "rounds=1", "peers=false", "prefill_tokens=0", "attention=mha"]
    small += ["memory_budget_gib=0.25"]  # of which a quarter is read to measure the bandwidth
    return {
        "evaluate": ("eval_model.py", [*place.places(), "run=run", "extras=[]"], place.runs / "run/evaluations"),
        "compare": ("scripts/compare_runs.py", [where, "run", f"out={out}", "tracking=none"], out / "comparison.png"),
        "export": ("scripts/export.py", [where, "run=run", f"to={out}"], out / "config.json"),
        "convert": ("scripts/convert.py", [where, "run=run", f"to={out}", *exact], out / "summary.json"),
        "benchmark": ("scripts/benchmark_decode.py", [*small, "device=cpu", f"out={out}"], out / "decode.json"),
    }


@pytest.mark.parametrize("name", ["evaluate", "compare", "export", "convert", "benchmark"])
def test_every_command_does_its_work_without_a_reader(name: str, shared: Workplace, tmp_path: Path, forks: Forks) -> None:
    script, arguments, left = commands(shared, tmp_path / "out")[name]
    reader = read_by("true", tmp_path / "pipe")
    assert forks.start(script, *arguments, streams=[os.devnull, None, tmp_path / "pipe"], folder=tmp_path).wait(240) == 0
    reader.communicate()
    assert left.exists()


def test_generating_ends_quietly_with_its_reader(shared: Workplace, tmp_path: Path, forks: Forks) -> None:
    options = [f"runs_dir={shared.runs}", "run=long", "device=cpu", "prompt=the\nsea", "max_new_tokens=4000"]
    started = time.monotonic()
    status, read, said = ended(forks, tmp_path, "reader leaves", "scripts/generate.py", *options)
    assert (status, read) == (0, "the\n") and "Traceback" not in said
    assert time.monotonic() - started < 60


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_another_encoding_prints_with_replacement(encoding: str, shared: Workplace, tmp_path: Path) -> None:
    command = line(
        "scripts/generate.py", f"runs_dir={shared.runs}", "run=run", "device=cpu", "prompt=réef 中", "max_new_tokens=1"
    )
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=tmp_path,
        env=ENVIRONMENT | {"PYTHONIOENCODING": encoding},
        capture_output=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("réef ?".encode(encoding, "replace"))


def started(place: Workplace, forks: Forks, **how: Any) -> tuple[Started, Path]:
    """A run of many steps with a process group of its own, once it has logged some."""
    overrides = place.overrides("name=run", "budget.steps=100000", "intervals.log=1", "intervals.checkpoint=50000")
    streams = [os.devnull, os.devnull, os.devnull]
    process = forks.start("train_model.py", *overrides, folder=place.folder, **({"streams": streams} | how))
    run = place.runs / "run"
    wait_for(lambda: (run / "metrics.jsonl").exists() and len(metrics_of(run)) > 5, process)
    return process, run


def assert_saved(run: Path) -> None:
    (saved,) = (int(path.name.removeprefix("step-")) for path in run.glob("checkpoints/step-*"))
    assert metrics_of(run)[-1]["step"] == saved > 0
    assert not (run / "summary.json").exists()


def test_ctrl_c_under_tee_saves_and_is_130(tmp_path: Path, forks: Forks) -> None:
    """Which ends tee at once: every line after that has no reader."""
    pipe = tmp_path / "pipe"
    tee = read_by(f"exec tee {tmp_path / 'out'}", pipe)
    process, run = started(Workplace(tmp_path), forks, streams=[os.devnull, pipe, pipe])
    tee.send_signal(signal.SIGINT)
    os.killpg(process.pid, signal.SIGINT)
    tee.communicate(timeout=60)
    assert process.wait(120) == 130
    assert_saved(run)


def test_a_hang_up_saves_and_is_129(tmp_path: Path, forks: Forks) -> None:
    process, run = started(Workplace(tmp_path), forks)
    process.send_signal(signal.SIGHUP)
    time.sleep(1.5)
    process.send_signal(signal.SIGHUP)  # a second one is no impatience
    assert process.wait(120) == 129
    assert_saved(run)


def test_an_ignored_hang_up_stays_ignored(tmp_path: Path, forks: Forks) -> None:
    process, run = started(Workplace(tmp_path), forks, ignoring=[signal.SIGHUP])
    process.send_signal(signal.SIGHUP)
    step = metrics_of(run)[-1]["step"]
    wait_for(lambda: metrics_of(run)[-1]["step"] > step + 20, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 143
    assert_saved(run)


def test_a_closed_terminal_does_not_end_a_run_that_ignores_hang_ups(tmp_path: Path, forks: Forks) -> None:
    place = Workplace(tmp_path)
    process, terminal = on_a_terminal(forks, *place.overrides("name=run", "budget.steps=60"), ignoring=[signal.SIGHUP])
    seen = b""
    while b"step 0: validation" not in seen:
        seen += os.read(terminal, 4096)
    os.close(terminal)
    assert process.wait(120) == 0
    assert_whole(place.runs / "run", 60)


def test_a_printed_line_is_there_at_once_whoever_reads() -> None:
    """A benchmark's rows in a file, while it runs and after it was killed."""
    text = "from harness.entry.streams import protect_streams; protect_streams(); print('a row'); import os; os._exit(9)"
    done = subprocess.run([sys.executable, "-c", text], cwd=ROOT, stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout) == (9, b"a row\n")


def test_progress_is_a_bar_on_a_terminal_and_a_line_at_each_interval_elsewhere(tmp_path: Path, forks: Forks) -> None:
    place = Workplace(tmp_path)
    arguments = place.overrides("budget.steps=6", "intervals.log=2")
    done = forks.run("train_model.py", *arguments, "name=run")
    said = [text for text in done.output.splitlines() if "training loss" in text]
    assert [text.partition(":")[0] for text in said] == ["step 2 of 6", "step 4 of 6", "step 6 of 6"]
    losses = {row["step"]: row["train/loss"] for row in metrics_of(place.runs / "run") if "train/loss" in row}
    for step, text in zip((2, 4, 6), said, strict=True):
        assert f": training loss {losses[step]:.4f}, " in text and " tokens/s, about 0:00:" in text
    assert len(json.dumps(json.loads(done.output.splitlines()[-1]))) <= 1024

    seen = shown_on_a_terminal(forks, *arguments, "name=shown", "budget.steps=150", width=120)
    assert re.search(rb"/150 \[.*loss \d\.\d{3}, [\d,]+ tokens/s", seen) and b"training loss" not in seen


def test_a_terminal_that_does_not_say_its_width_gets_lines(tmp_path: Path, forks: Forks) -> None:
    """As containers give it; no bar is drawn there."""
    seen = shown_on_a_terminal(forks, *Workplace(tmp_path).overrides("budget.steps=6", "intervals.log=2"), width=0)
    assert seen.count(b"training loss") == 3


def on_a_terminal(forks: Forks, *arguments: str, width: int = 80, ignoring: Sequence[int] = ()) -> tuple[Started, int]:
    """train_model.py on a terminal of its own, and that terminal's other side."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24 if width else 0, width))
    streams = [os.ttyname(theirs)] * 3
    process = forks.start("train_model.py", *arguments, streams=streams, session=True, ignoring=ignoring)
    assert os.read(ours, 1)  # it has it open
    os.close(theirs)
    return process, ours


def shown_on_a_terminal(forks: Forks, *arguments: str, width: int) -> bytes:
    """All that train_model.py shows there."""
    process, terminal = on_a_terminal(forks, *arguments, width=width)
    seen = b""
    while True:
        try:
            seen += os.read(terminal, 4096)
        except OSError:  # the program has ended
            break
    os.close(terminal)
    assert process.wait(60) == 0
    return seen
