"""What all tests share: flags, few threads, processes that start others, and no dashboard of the user's own."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.support.attempts import Killer
from tests.support.forks import Forks
from tests.support.micro import Workplace


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rewrite-goldens", action="store_true", help="record the losses of tests/golden/ anew")
    parser.addoption("--fuzz-inputs", type=int, default=2_400, help="wrong inputs that tests/fuzz/ tries, in all")
    parser.addoption("--kills", type=int, help="tests/entry/test_kills.py: so many kills of each kind, not a few")


def pytest_configure() -> None:
    """Python's collector looks through all of torch and transformers by itself, a tenth of the time: more rarely."""
    gc.set_threshold(*gc.get_threshold()[:2], 100)


@pytest.fixture(autouse=True, scope="session")
def few_threads() -> None:
    """The models here are so small that more than two threads only wait for each other; processes, likewise."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    threads = max(1, min(2, torch.get_num_threads() // workers))
    torch.set_num_threads(threads)
    if workers > 1:
        os.environ["OMP_NUM_THREADS"] = str(threads)  # of the commands that tests start


@pytest.fixture(autouse=True, scope="module")
def collected() -> None:
    """What tests have left is collected before those of the next file; what is there then stays, and is not looked at again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Starts commands as processes, see tests/support/forks.py."""
    forks = Forks(tmp_path_factory.mktemp("forks"))
    yield forks
    forks.close()


@pytest.fixture(scope="session")
def killer(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Killer]:
    """Starts runs that are killed, see tests/support/attempts.py; each test gives its runs names of their own."""
    killer = Killer(Workplace(tmp_path_factory.mktemp("killed")), forks)
    yield killer
    killer.close()


@pytest.fixture(autouse=True, scope="session")
def trackio_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """TRACKIO_DIR for all tests, whichever of them comes first: the package reads it once, when it is imported."""
    folder = tmp_path_factory.mktemp("trackio")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("TRACKIO_DIR", str(folder))
        yield folder


@pytest.fixture
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder without a key, none of W&B's variables."""
    for key in [key for key in os.environ if key.startswith("WANDB_")] + ["NETRC"]:
        monkeypatch.delenv(key, raising=False)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    return home
