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
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.config.places import ROOT
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


LOST = {
    "stdout closed": "{} >&-",
    "stderr closed": "{} 2>&-",
    "all closed": "{} <&- >&- 2>&-",
    "reader leaves": "{} | head -1",
    "no reader, stderr too": "{} 2>&1 | true",
    "full disk": "{} > /dev/full 2>&1",
}


@pytest.mark.parametrize("how", LOST)
@pytest.mark.parametrize("sweep", ["", "-m "])
def test_a_run_whose_lines_cannot_be_printed_goes_on_to_its_end(how: str, sweep: str, tmp_path: Path) -> None:
    if sweep and how not in ("all closed", "reader leaves"):
        pytest.skip("once is enough")
    place = Workplace(tmp_path)
    training = line("train_model.py", *([sweep.strip()] if sweep else []), *place.overrides("name=run"))
    done = shell(LOST[how].format(training), tmp_path)
    assert "Traceback" not in done.stderr and "error" not in done.stderr
    assert done.stderr.endswith("status 0\n")
    assert_whole(place.runs / "run")


def test_a_mistake_keeps_its_status_where_it_cannot_be_said(tmp_path: Path) -> None:
    place = Workplace(tmp_path)
    done = shell(LOST["all closed"].format(line("train_model.py", *place.overrides("device=gpu"))), tmp_path)
    assert done.stderr == "status 2\n"
    assert not place.runs.exists()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    place = Workplace(tmp_path_factory.mktemp("shared"))
    place.train("run")
    place.train("long", "model.max_seq_len=4096", "budget.steps=1", "batch_size=1", "evaluation.max_tokens=100")
    return place


def commands(place: Workplace, out: Path) -> dict[str, tuple[str, Path]]:
    """A line for each command, and a file that it leaves when it goes on to its end."""
    where = [f"runs_dir={place.runs}"]
    small = ["contexts=8", "batch_sizes=1", "steps=1", "rounds=1", "peers=false", "prefill_tokens=0", "attention=mha"]
    return {
        "evaluate": (line("eval_model.py", *place.places(), "run=run", "extras=[]"), place.runs / "run/evaluations"),
        "compare": (line("scripts/compare_runs.py", *where, "run", f"out={out}", "tracking=none"), out / "comparison.png"),
        "export": (line("scripts/export.py", *where, "run=run", f"to={out}"), out / "config.json"),
        "convert": (
            line(
                "scripts/convert.py",
                *where,
                f"data_dir={place.folder / 'data'}",
                "run=run",
                f"to={out}",
                "method=exact",
                "device=cpu",
            ),
            out / "summary.json",
        ),
        "benchmark": (line("scripts/benchmark_decode.py", *small, "device=cpu", f"out={out}"), out / "decode.json"),
    }


@pytest.mark.parametrize("name", ["evaluate", "compare", "export", "convert", "benchmark"])
def test_every_command_does_its_work_without_a_reader(name: str, shared: Workplace, tmp_path: Path) -> None:
    command, left = commands(shared, tmp_path / "out")[name]
    done = shell(f"{command} 2>&1 >&- | true", tmp_path)
    assert done.stderr == "status 0\n"
    assert left.exists()


def test_generating_ends_quietly_with_its_reader(shared: Workplace, tmp_path: Path) -> None:
    command = line(
        "scripts/generate.py", f"runs_dir={shared.runs}", "run=long", "device=cpu", "prompt=the\nsea", "max_new_tokens=4000"
    )
    started = time.monotonic()
    done = shell(f"{command} | head -1", tmp_path)
    assert done.stdout == "the\n" and done.stderr.endswith("status 0\n") and "Traceback" not in done.stderr
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


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)


def started(place: Workplace, text: str) -> tuple[subprocess.Popen[bytes], Path]:
    """A run of many steps as a job of bash with a process group of its own, once it has logged some."""
    overrides = place.overrides("name=run", "budget.steps=100000", "intervals.log=1", "intervals.checkpoint=50000")
    process = subprocess.Popen(
        ["bash", "-c", text.format(line("train_model.py", *overrides))],
        cwd=place.folder,
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        process_group=0,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # nohup's is kept by its children
    )
    run = place.runs / "run"
    wait_for(lambda: (run / "metrics.jsonl").exists() and len(metrics_of(run)) > 5, process)
    return process, run


def assert_saved(run: Path) -> None:
    (saved,) = (int(path.name.removeprefix("step-")) for path in run.glob("checkpoints/step-*"))
    assert metrics_of(run)[-1]["step"] == saved > 0
    assert not (run / "summary.json").exists()


def test_ctrl_c_under_tee_saves_and_is_130(tmp_path: Path) -> None:
    """Which ends tee at once: every line after that has no reader."""
    process, run = started(Workplace(tmp_path), "trap : INT; {} 2>&1 | tee out > /dev/null; exit ${{PIPESTATUS[0]}}")
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=120) == 130
    assert_saved(run)


def test_a_hang_up_saves_and_is_129(tmp_path: Path) -> None:
    process, run = started(Workplace(tmp_path), "exec {}")
    process.send_signal(signal.SIGHUP)
    time.sleep(1.5)
    process.send_signal(signal.SIGHUP)  # a second one is no impatience
    assert process.wait(timeout=120) == 129
    assert_saved(run)


def test_an_ignored_hang_up_stays_ignored(tmp_path: Path) -> None:
    process, run = started(Workplace(tmp_path), "trap '' HUP; exec {}")
    process.send_signal(signal.SIGHUP)
    step = metrics_of(run)[-1]["step"]
    wait_for(lambda: metrics_of(run)[-1]["step"] > step + 20, process)
    process.terminate()
    assert process.wait(timeout=120) == 143
    assert_saved(run)


def test_a_closed_terminal_does_not_end_a_run_that_ignores_hang_ups(tmp_path: Path) -> None:
    place = Workplace(tmp_path)
    text = f"trap '' HUP; {line('train_model.py', *place.overrides('name=run', 'budget.steps=60'))}; echo $? > status"
    child, terminal = pty.fork()
    if not child:
        os.chdir(place.folder)
        os.environ["OMP_NUM_THREADS"] = "1"
        os.execv("/bin/bash", ["bash", "-c", text])
    seen = b""
    while b"step 0: validation" not in seen:
        seen += os.read(terminal, 4096)
    os.close(terminal)
    os.waitpid(child, 0)
    assert (place.folder / "status").read_text() == "0\n"
    assert_whole(place.runs / "run", 60)


def test_a_printed_line_is_there_at_once_whoever_reads() -> None:
    """A benchmark's rows in a file, while it runs and after it was killed."""
    text = "from harness.entry.streams import protect_streams; protect_streams(); print('a row'); import os; os._exit(9)"
    done = subprocess.run([sys.executable, "-c", text], cwd=ROOT, stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout) == (9, b"a row\n")


def test_progress_is_a_bar_on_a_terminal_and_a_line_at_each_interval_elsewhere(tmp_path: Path) -> None:
    place = Workplace(tmp_path)
    arguments = place.overrides("budget.steps=6", "intervals.log=2")
    done = shell(line("train_model.py", *arguments, "name=run"), tmp_path)
    said = [text for text in done.stdout.splitlines() if "training loss" in text]
    assert [text.partition(":")[0] for text in said] == ["step 2 of 6", "step 4 of 6", "step 6 of 6"]
    losses = {row["step"]: row["train/loss"] for row in metrics_of(place.runs / "run") if "train/loss" in row}
    for step, text in zip((2, 4, 6), said, strict=True):
        assert f": training loss {losses[step]:.4f}, " in text and " tokens/s, about 0:00:" in text
    assert len(json.dumps(json.loads(done.stdout.splitlines()[-1]))) <= 1024

    seen = on_a_terminal(*arguments, "name=shown", "budget.steps=150", width=120)
    assert re.search(rb"/150 \[.*loss \d\.\d{3}, [\d,]+ tokens/s", seen) and b"training loss" not in seen


def test_a_terminal_that_does_not_say_its_width_gets_lines(tmp_path: Path) -> None:
    """As containers give it; no bar is drawn there."""
    seen = on_a_terminal(*Workplace(tmp_path).overrides("budget.steps=6", "intervals.log=2"), width=0)
    assert seen.count(b"training loss") == 3


def on_a_terminal(*arguments: str, width: int) -> bytes:
    """What train_model.py shows there."""
    child, terminal = pty.fork()
    if not child:
        os.environ["OMP_NUM_THREADS"] = "1"
        termios.tcsetwinsize(0, (24 if width else 0, width))
        os.execv(sys.executable, [sys.executable, str(ROOT / "train_model.py"), *arguments])
    seen = b""
    while True:
        try:
            seen += os.read(terminal, 4096)
        except OSError:  # the program has ended
            break
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    return seen
