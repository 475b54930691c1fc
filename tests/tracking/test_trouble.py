"""A training that W&B's server leaves alone in the middle is the training that it would have been, and as fast."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.forks import Forks
from tests.support.micro import Workplace, metrics_of, rows_of_steps, summary_of, without_clocks
from tests.support.wandb_server import KEY, WandbServer

ROOT = Path(__file__).resolve().parents[2]
BUDGET = ("budget.steps=40", "intervals.log=1")
FAULTS: dict[str, Callable[[WandbServer], object]] = {
    "gone": lambda server: threading.Thread(target=server.close).start(),
    "silent": lambda server: server.silent.set(),
    "failing": lambda server: server.failing.set(),
    "slow": lambda server: setattr(server, "seconds", 1.0),
}


@pytest.fixture
def place(tmp_path: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    """A workplace, and W&B's variables set here alone."""
    for name, value in (("FINISH_TIMEOUT", "3"), ("INIT_TIMEOUT", "3"), ("API_KEY", KEY)):
        monkeypatch.setenv(f"WANDB_{name}", value)
    return Workplace(tmp_path / "work")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that those below would have been."""
    return Workplace(tmp_path_factory.mktemp("plain")).train("plain", *BUDGET)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_in_trouble_in_mid_run_changes_nothing_that_was_trained_and_loses_nothing(
    fault: str, plain: Path, place: Workplace, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with WandbServer() as server:
        server.trouble = FAULTS[fault]
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        started = time.monotonic()
        run = place.train("tracked", *BUDGET, "tracking=wandb")
        seconds = time.monotonic() - started
    assert list(map(without_clocks, metrics_of(run))) == list(map(without_clocks, metrics_of(plain)))
    assert summary_of(run)["loss"] == summary_of(plain)["loss"]
    assert summary_of(run)["seconds"] < summary_of(plain)["seconds"] + 2, "the steps themselves wait for nobody"
    assert seconds < 30
    said = capfd.readouterr().err
    with WandbServer() as revived:  # what the client kept on the disk is everything
        environment = os.environ | {"WANDB_BASE_URL": revived.url, "WANDB_CACHE_DIR": str(place.folder / "cache")}
        found = re.findall(r"upload the rest with: (.+)\n", said)
        (fragment,) = run.glob("wandb/run-*")
        command = found[0] if found else f"{sys.executable} -m wandb sync --include-online {fragment}"
        subprocess.run(command, shell=True, env=environment, cwd=ROOT, check=True, timeout=60, capture_output=True)
        assert revived.only_run().history == rows_of_steps(run)


def test_a_server_out_of_reach_from_the_start_costs_seconds_and_the_fragment_is_whole(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    plain = place.train("plain")
    started = time.monotonic()
    run = place.train("tracked", "tracking=wandb")
    assert time.monotonic() - started < 20
    assert list(map(without_clocks, metrics_of(run))) == list(map(without_clocks, metrics_of(plain)))
    (fragment,) = run.glob("wandb/offline-run-*")
    with WandbServer() as revived:
        environment = os.environ | {"WANDB_BASE_URL": revived.url, "WANDB_CACHE_DIR": str(place.folder / "cache")}
        command = [sys.executable, "-m", "wandb", "sync", str(fragment)]
        subprocess.run(command, env=environment, cwd=ROOT, check=True, timeout=60, capture_output=True)
        assert revived.only_run().history == rows_of_steps(run)


def test_keys_and_tokens_reach_no_file_no_output_and_no_server(place: Workplace, forks: Forks) -> None:
    secrets = {"WANDB_API_KEY": "5ecre7" + "0a" * 17, "HF_TOKEN": "hf_" + "5ecre7t0ken" * 2}
    password = "pa55" + "w0rd"  # in two: a run keeps how the project's files differ from its commit, this one among them
    with WandbServer() as server:
        environment = secrets | {
            "WANDB_BASE_URL": server.url,
            "HF_ENDPOINT": f"http://user:{password}@127.0.0.1:9/?token={password}",
            "WANDB_FINISH_TIMEOUT": "20",
            "WANDB_INIT_TIMEOUT": "20",
            "HF_HOME": str(place.folder / "hub"),
        }
        outputs = []
        for overrides, status in (
            (place.overrides("name=tracked", "tracking=wandb", "tracking.notes=mine"), 0),
            (place.overrides("name=hub", "dataset=wikitext2", "dataset.path=null"), 2),
            (place.overrides("name=odd", "seed=-1"), 2),
        ):
            done = forks.run("train_model.py", *overrides, environment=environment)
            assert done.status == status, done.errors
            outputs.append(done.output + done.errors)
        assert server.only_run().config["seed"] == 0 and len(server.bodies) > 3
    files = [path for path in place.folder.parent.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files) and "127.0.0.1:9" in outputs[1]
    for secret in (*secrets.values(), password):
        assert not any(secret in output for output in outputs)
        assert not any(secret.encode() in body for body in server.bodies)
        assert [str(path) for path in files if secret.encode() in path.read_bytes()] == []
