"""The multi-process service around a study's runs: when it is started, what runs get, and that it always ends.

The daemon is a shell script here, which notes what it was told.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.config.places import ROOT
from harness.study.gpu_service import CONTROL, multi_process_service
from harness.study.runner import Slot, slots

WORKS, FAILS = ("true",), ("false",)
TWO_A_GPU = slots(["0", "3"], jobs=2, cores=8)


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """Installs the daemon; what it has been told so far."""
    (tmp_path / "bin").mkdir()
    log = tmp_path / "log"
    daemon = tmp_path / "bin" / CONTROL
    daemon.write_text(
        f'#!/bin/sh\nif [ "$1" = -d ]; then\n'
        f'  echo "start ${{CUDA_VISIBLE_DEVICES:-all}} $CUDA_MPS_PIPE_DIRECTORY" >> {log}; exit 0\nfi\n'
        f'read words; echo "$words $CUDA_MPS_PIPE_DIRECTORY" >> {log}\n'
    )
    daemon.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3")
    monkeypatch.delenv("CUDA_MPS_PIPE_DIRECTORY", raising=False)
    return lambda: log.read_text().splitlines() if log.exists() else []


def test_runs_that_share_a_gpu_get_a_service_that_ends_with_them(
    told: Callable[[], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    with multi_process_service(TWO_A_GPU, trial=WORKS) as served:
        folder = served[0].environment["CUDA_MPS_PIPE_DIRECTORY"]
        assert told() == [f"start all {folder}"] and Path(folder).is_dir()
        assert [place.environment["CUDA_VISIBLE_DEVICES"] for place in served] == ["0", "3", "0", "3"]
        assert {place.environment["CUDA_MPS_PIPE_DIRECTORY"] for place in served} == {folder}
        assert "CUDA_MPS_PIPE_DIRECTORY" not in os.environ
    assert told()[1:] == [f"quit {folder}"] and not Path(folder).exists()
    assert "side by side" in capsys.readouterr().err


@pytest.mark.parametrize("places", [slots(["0", "3"], jobs=1, cores=8), slots([], jobs=4, cores=8)], ids=["alone", "no GPU"])
def test_runs_that_share_none_get_none(told: Callable[[], list[str]], places: list[Slot]) -> None:
    with multi_process_service(places, trial=WORKS) as served:
        assert served == places
    assert told() == []


def test_a_service_that_is_in_use_already_stays(told: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", "/somewhere")
    with multi_process_service(TWO_A_GPU, trial=WORKS) as served:
        assert served == TWO_A_GPU
    assert told() == []


@pytest.mark.parametrize("cause", ["it does not start", "nothing can compute through it"])
def test_where_it_does_not_work_runs_take_turns_and_that_is_said(
    told: Callable[[], list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str], cause: str
) -> None:
    if cause == "it does not start":
        (tmp_path / "bin" / CONTROL).write_text("#!/bin/sh\nexit 1\n")
    with multi_process_service(TWO_A_GPU, trial=FAILS) as served:
        assert served == TWO_A_GPU
    assert [line.split()[0] for line in told()] == ([] if cause == "it does not start" else ["start", "quit"])
    assert "does not start here: runs that share a GPU take turns" in capsys.readouterr().err


def test_it_ends_even_when_the_study_is_killed(told: Callable[[], list[str]]) -> None:
    program = (
        "from harness.study.gpu_service import multi_process_service\nfrom harness.study.runner import slots\nimport time\n"
        "with multi_process_service(slots(['0'], jobs=2, cores=8), trial=('true',)):\n    print('up', flush=True)\n"
        "    time.sleep(60)\n"
    )
    study = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE)
    assert study.stdout is not None and study.stdout.readline() == b"up\n"
    study.send_signal(signal.SIGKILL)
    study.wait()
    for _ in range(200):
        if len(told()) == 2:
            break
        time.sleep(0.1)
    assert [line.split()[0] for line in told()] == ["start", "quit"]
