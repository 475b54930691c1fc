"""scripts/prepare_data.py in a copy of the project: what set-up prepares, and which dataset runs then use."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.support.forks import Ended, Forks
from tests.support.projects import copy_project

FAST = "tokenizer=bytes"  # no tokenizer to train


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Starts the commands of a copy of the project."""
    forks = Forks(tmp_path_factory.mktemp("forks"), copy_project(tmp_path_factory.mktemp("copy") / "project"))
    yield forks
    forks.close()


@pytest.fixture
def project(forks: Forks) -> Iterator[Path]:
    """That copy, without data and with the configuration that is shipped."""
    project = forks.project
    shipped = project.parent / "shipped"
    if not shipped.exists():
        shutil.copytree(project / "configs", shipped)
    yield project
    for name in ("data", "texts", "hub cache", "configs"):
        shutil.rmtree(project / name, ignore_errors=True)
    shutil.copytree(shipped, project / "configs")


@pytest.fixture
def silent_hub() -> Iterator[socket.socket]:
    """A server that never answers; who accepts a connection knows when it was asked."""
    with socket.create_server(("127.0.0.1", 0), backlog=50) as server:
        server.settimeout(120)
        yield server


def address(server: socket.socket) -> str:
    return f"http://127.0.0.1:{server.getsockname()[1]}"


def closed_hub() -> str:
    """An address at which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return address(server)


def prepare(forks: Forks, *arguments: str) -> Ended:
    environment = {"HF_ENDPOINT": closed_hub(), "HF_HOME": str(forks.project / "hub cache")}
    return forks.run("scripts/prepare_data.py", f"data_dir={forks.project / 'data'}", *arguments, environment=environment)


def dataset_of_runs(forks: Forks, *overrides: str) -> str:
    """The dataset that the project's train_model.py uses with these overrides."""
    shown = forks.run("train_model.py", "--cfg", "job", *overrides)
    assert shown.status == 0, shown.errors
    name: str = yaml.safe_load(shown.output)["dataset"]["name"]
    return name


def let_wikitext2_arrive(project: Path) -> None:
    """A wikitext2 that lies on this machine, in place of the one on the hub."""
    texts = project / "texts"
    texts.mkdir()
    for split in ("train", "validation", "test"):
        (texts / f"{split}.txt").write_text(f"some text for {split}\n" * 20)
    config = f"name: wikitext2\nsource: local\npath: {texts}\ntext_column: text\n"
    (project / "configs" / "dataset" / "wikitext2.yaml").write_text(config)


def local_config(project: Path) -> Path:
    return project / "configs" / "local" / "default.yaml"


def test_without_the_hub_stdlib_is_prepared_loudly_and_selected_until_wikitext2_arrives(project: Path, forks: Forks) -> None:
    result = prepare(forks, FAST)
    assert result.status == 0, result.errors
    assert "!! stdlib is prepared instead of wikitext2" in result.errors
    assert "out of reach" in result.errors
    assert list(project.glob("data/stdlib-*/meta.json"))
    assert dataset_of_runs(forks) == "stdlib"
    assert dataset_of_runs(forks, "dataset=wikitext2") == "wikitext2"

    let_wikitext2_arrive(project)
    result = prepare(forks, FAST)
    assert result.status == 0, result.errors
    assert not local_config(project).exists()
    assert dataset_of_runs(forks) == "wikitext2"


def test_a_hub_that_never_answers_is_given_up_within_five_seconds(
    project: Path, forks: Forks, silent_hub: socket.socket, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "pipe")
    environment = {"HF_ENDPOINT": address(silent_hub), "HF_HOME": str(project / "hub cache")}
    process = forks.start(
        "scripts/prepare_data.py",
        f"data_dir={project / 'data'}",
        FAST,
        streams=[os.devnull, tmp_path / "pipe", tmp_path / "pipe"],
        environment=environment,
    )
    with (tmp_path / "pipe").open() as said, silent_hub.accept()[0]:  # imports before it take as long as the machine is busy
        asked = time.monotonic()
        told = [time.monotonic() - asked for line in said if line.startswith("!!")]
    assert process.wait(60) == 0
    assert told[0] < 5


def test_a_named_dataset_is_prepared_and_selects_nothing(project: Path, forks: Forks) -> None:
    result = prepare(forks, "stdlib", FAST)
    assert result.status == 0, result.errors
    assert list(project.glob("data/stdlib-*/meta.json"))
    assert not local_config(project).exists()


def test_several_names_are_all_prepared_with_the_same_overrides(project: Path, forks: Forks) -> None:
    let_wikitext2_arrive(project)
    (project / "configs" / "dataset" / "mine.yaml").write_text(
        (project / "configs" / "dataset" / "wikitext2.yaml").read_text().replace("wikitext2", "mine")
    )
    result = prepare(forks, "wikitext2", FAST, "mine")
    assert result.status == 0, result.errors
    folders = list(project.glob("data/*/meta.json"))
    assert {folder.parent.name.rsplit("-", 1)[0] for folder in folders} == {"wikitext2", "mine"}
    assert all(json.loads(folder.read_text())["vocab_size"] < 300 for folder in folders)


@pytest.mark.parametrize("argument", ["wikitext103", "dataset=wikitext103"])
def test_a_named_dataset_out_of_reach_is_an_error_and_no_other_takes_its_place(
    project: Path, forks: Forks, argument: str
) -> None:
    result = prepare(forks, argument, FAST)
    assert result.status == 2
    assert result.errors.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in result.errors
    assert not list(project.glob("data/*/meta.json"))
    assert not local_config(project).exists()


def test_a_misspelt_name_is_one_sentence_with_the_right_one(project: Path, forks: Forks) -> None:
    result = prepare(forks, "wikitxt2")
    assert result.status == 2
    assert result.errors.splitlines() == [result.errors.strip()]
    assert "wikitext2" in result.errors


def test_a_name_like_none_is_one_sentence_with_every_choice(project: Path, forks: Forks) -> None:
    result = prepare(forks, "shakespeare", FAST)
    assert result.status == 2
    assert len(result.errors.splitlines()) == 1
    for file in (project / "configs" / "dataset").glob("*.yaml"):
        assert file.stem in result.errors


def test_a_local_file_of_the_users_own_is_neither_overwritten_nor_removed(project: Path, forks: Forks) -> None:
    local_config(project).parent.mkdir()
    own = "# @package _global_\ndefaults:\n  - override /dataset: tinystories\n"
    local_config(project).write_text(own)
    result = prepare(forks, FAST)
    assert result.status == 0, result.errors
    assert "your own" in result.errors
    let_wikitext2_arrive(project)
    assert prepare(forks, FAST).status == 0
    assert local_config(project).read_text() == own
