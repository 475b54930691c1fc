"""The hub's path for real: the libraries in a process of their own, against a loopback server that plays the hub."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from harness.config.schema import DatasetConfig, TokenizerConfig
from harness.data import Tokenizer, hub_client, open_prepared
from harness.data import hub as hub_module
from harness.data.documents import Document
from harness.data.hub import articles, hub_source
from harness.errors import UserError
from tests.support.corpora import BYTES, documents_of, local, text
from tests.support.hub_server import REVISION, HubServer
from tests.support.prepare_in_subprocess import ROOT, prepare_in_subprocess

STORIES = {
    split: [text(seed, 200) for seed in range(first, first + count)]
    for split, first, count in (("train", 0, 1400), ("validation", 5000, 20), ("test", 6000, 20))
}
README = """---
configs:
- config_name: stories
  data_files:
  - split: train
    path: stories/train-*
  - split: validation
    path: stories/validation-*
  - split: test
    path: stories/test-*
- config_name: unsplit
  data_files:
  - split: train
    path: stories/train-*
---
"""


def write_repository(folder: Path) -> dict[str, str]:
    """A dataset in parquet files, the training split in two; returns file -> SHA-256."""
    (folder / "stories").mkdir(parents=True)
    shards = {
        "train-00000-of-00002": STORIES["train"][:1200],
        "train-00001-of-00002": STORIES["train"][1200:],
        "validation-00000-of-00001": STORIES["validation"],
        "test-00000-of-00001": STORIES["test"],
    }
    for name, texts in shards.items():
        table = pyarrow.table({"text": texts, "id": list(range(len(texts)))})
        pyarrow.parquet.write_table(table, folder / f"stories/{name}.parquet", row_group_size=100)
    (folder / "README.md").write_text(README)
    files = sorted((folder / "stories").iterdir())
    return {f"stories/{file.name}": hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


class TimedHub(HubServer):
    """Notes when each connection is accepted: what a process does before it asks takes as long as the machine is busy."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.accepted: list[float] = []
        accept = self.server.get_request

        def get_request() -> Any:
            request = accept()
            self.accepted.append(time.monotonic())
            return request

        self.server.get_request = get_request  # type: ignore[method-assign]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[TimedHub]:
    with TimedHub(tmp_path / "hub") as server:
        yield server


@pytest.fixture
def pinned(tmp_path: Path) -> DatasetConfig:
    return DatasetConfig(
        name="stories",
        source="hub",
        hub_name="someone/stories",
        hub_config="stories",
        hub_revision=REVISION,
        sha256=write_repository(tmp_path / "hub/datasets/someone/stories"),
    )


def prepared(
    hub: HubServer, dataset: DatasetConfig, tmp_path: Path, tokenizer: TokenizerConfig = BYTES, **environment: str
) -> dict[str, Any]:
    defaults = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    return prepare_in_subprocess(dataset, tokenizer, tmp_path / "data", defaults | environment)


def waited(
    hub: TimedHub, dataset: DatasetConfig, tmp_path: Path, tokenizer: TokenizerConfig = BYTES
) -> tuple[dict[str, Any], float]:
    """The answer, and the seconds from the first time that the hub is asked to the end of the process that asks."""
    before = len(hub.accepted)
    answer = prepared(hub, dataset, tmp_path, tokenizer)
    return answer, time.monotonic() - hub.accepted[before]


def check_stories(answer: dict[str, Any]) -> None:
    assert "folder" in answer, answer
    data = open_prepared(Path(answer["folder"]))
    assert {split: documents_of(data, split) for split in data.splits} == STORIES


def folders(tmp_path: Path) -> list[Path]:
    return [path for path in tmp_path.glob("data/*") if path.is_dir()]


def test_a_download_that_breaks_off_and_is_refused_comes_whole(hub: HubServer, pinned: DatasetConfig, tmp_path: Path) -> None:
    hub.cut, hub.unavailable = 1, 1
    check_stories(prepared(hub, pinned, tmp_path))
    # Found again without asking anyone, and without the libraries.
    hub.silent = True
    hub.requests.clear()
    again = prepared(hub, pinned, tmp_path)
    check_stories(again)
    assert not hub.requests
    assert not {"datasets", "huggingface_hub", "pyarrow", "pandas"} & set(again["modules"])
    # The files in the hub's cache serve another preparation, also when the user forbids the network.
    check_stories(prepared(hub, dataclasses.replace(pinned, split_seed=1), tmp_path, HF_HUB_OFFLINE="1"))
    assert len(folders(tmp_path)) == 2


def test_files_without_a_pinned_hash_are_checked_against_the_hubs(
    hub: HubServer, pinned: DatasetConfig, tmp_path: Path
) -> None:
    unpinned = dataclasses.replace(pinned, sha256={})
    hub.corrupt = True
    answer = prepared(hub, unpinned, tmp_path)
    assert "arrived twice with content other than its hash says" in answer["error"]
    assert not folders(tmp_path)
    hub.corrupt = False
    check_stories(prepared(hub, unpinned, tmp_path))


def test_wrong_bytes_of_the_right_length_are_deleted_and_never_used(
    hub: HubServer, pinned: DatasetConfig, tmp_path: Path
) -> None:
    hub.corrupt = True
    answer = prepared(hub, pinned, tmp_path)
    assert answer["kind"] == "UserError"
    assert "arrived twice with content other than its hash says" in answer["error"]
    assert not folders(tmp_path)
    assert not [path for path in (tmp_path / "home").rglob("*.parquet")]
    assert not [path for path in (tmp_path / "home").rglob("blobs/*") if path.is_file()]


@pytest.mark.parametrize("streamed", [False, True], ids=["downloaded", "streamed"])
def test_a_hub_that_never_answers_is_noticed_within_five_seconds(
    hub: TimedHub, pinned: DatasetConfig, tmp_path: Path, streamed: bool
) -> None:
    hub.silent = True
    dataset = dataclasses.replace(pinned, sha256={}, hub_streaming=True) if streamed else pinned
    answer, seconds = waited(hub, dataset, tmp_path)
    assert answer["kind"] == "HubUnreachable"
    assert seconds < 5
    for remedy in ("dataset=stdlib", "dataset.path=FOLDER", "HF_ENDPOINT=URL", "HF_HUB_OFFLINE=1"):
        assert remedy in answer["error"]
    assert "datasets" not in answer["modules"]
    assert not folders(tmp_path)


def test_downloads_that_are_accepted_and_never_answered_are_noticed_within_five_seconds(
    hub: TimedHub, pinned: DatasetConfig, tmp_path: Path
) -> None:
    hub.stalled = True
    answer, seconds = waited(hub, pinned, tmp_path)
    assert answer["kind"] == "HubUnreachable", answer
    assert seconds < 5


def test_a_stream_is_read_up_to_the_cap_and_survives_a_broken_connection(
    hub: HubServer, pinned: DatasetConfig, tmp_path: Path
) -> None:
    hub.cut = 1
    streamed = dataclasses.replace(
        pinned, hub_config="unsplit", sha256={}, hub_streaming=True, max_tokens=50_000, validation_fraction=0.1
    )
    answer = prepared(hub, streamed, tmp_path)
    assert "folder" in answer, answer
    data = open_prepared(Path(answer["folder"]))
    assert data.splits["train"].n_tokens == 50_000
    read = [document for split in data.splits for document in documents_of(data, split)[:-1]]
    assert len(read) == len(set(read)) and set(read) <= set(STORIES["train"][:400])
    assert 0.04 < data.splits["validation"].n_documents / len(read) < 0.2
    second = "train-00001-of-00002"
    assert hub.downloads[f"stories/{second}.parquet"] == 0  # the cap was reached before


def test_a_pretrained_tokenizer_comes_from_the_hub_by_its_name(hub: TimedHub, tmp_path: Path) -> None:
    model = tmp_path / "hub/models/someone/model"
    model.mkdir(parents=True)
    Tokenizer.train_bpe(STORIES["test"], 300).save(model)
    (tmp_path / "train.txt").write_text(STORIES["train"][0])
    dataset = local(tmp_path / "train.txt", validation_fraction=0, test_fraction=0)
    named = TokenizerConfig(name="pretrained", path="someone/model")
    hub.unavailable = 1
    answer = prepared(hub, dataset, tmp_path, named)
    data = open_prepared(Path(answer["folder"]))
    assert data.vocab_size == 300 and documents_of(data, "train") == [STORIES["train"][0]]
    hub.silent = True
    assert prepared(hub, dataset, tmp_path, named)["folder"] == answer["folder"]  # without asking the hub
    absent, seconds = waited(hub, dataset, tmp_path, dataclasses.replace(named, path="someone/else"))
    assert absent["kind"] == "HubUnreachable" and seconds < 5


@pytest.mark.parametrize("how", ["silent", "refusing", "offline"])
def test_a_tokenizer_out_of_reach_is_replaced_by_another_tokenizer_not_another_dataset(
    hub: HubServer, tmp_path: Path, how: str
) -> None:
    model = tmp_path / "hub/models/someone/model"
    model.mkdir(parents=True)
    (model / "tokenizer.json").write_text("{}")
    hub.silent, hub.unavailable = how == "silent", 99 if how == "refusing" else 0
    (tmp_path / "train.txt").write_text("some text")
    dataset = local(tmp_path / "train.txt", validation_fraction=0, test_fraction=0)
    named = TokenizerConfig(name="pretrained", path="someone/model")
    answer = prepared(hub, dataset, tmp_path, named, **({"HF_HUB_OFFLINE": "1"} if how == "offline" else {}))
    assert answer["kind"] == "HubUnreachable", answer
    assert "the tokenizer.json of someone/model" in answer["error"]
    for remedy in ("tokenizer=bpe", "tokenizer.path=FILE"):
        assert remedy in answer["error"]
    assert "dataset" not in answer["error"]
    assert not folders(tmp_path)


def test_what_the_hub_does_not_have_is_no_outage(hub: HubServer, pinned: DatasetConfig, tmp_path: Path) -> None:
    answer = prepared(hub, dataclasses.replace(pinned, hub_name="someone/else"), tmp_path)
    assert answer["kind"] == "UserError"
    assert "does not have stories/validation-00000-of-00001.parquet of someone/else" in answer["error"]


def test_a_name_that_nothing_on_the_hub_can_have_is_one_sentence(hub: HubServer, pinned: DatasetConfig, tmp_path: Path) -> None:
    answer = prepared(hub, dataclasses.replace(pinned, hub_name="someone/some--thing"), tmp_path)
    assert answer["kind"] == "UserError"
    assert answer["error"] == "someone/some--thing is no name on the hub: correct it to OWNER/NAME, as in its address"
    assert not hub.downloads


def test_offline_without_a_cache_is_said_at_once(hub: HubServer, pinned: DatasetConfig, tmp_path: Path) -> None:
    answer = prepared(hub, pinned, tmp_path, HF_HUB_OFFLINE="1")
    assert answer["kind"] == "HubUnreachable" and "HF_HUB_OFFLINE is set" in answer["error"]
    assert not hub.requests


def test_a_folder_with_the_repositorys_files_needs_no_hub(hub: HubServer, pinned: DatasetConfig, tmp_path: Path) -> None:
    hub.silent = True
    folder = tmp_path / "hub/datasets/someone/stories"
    check_stories(prepared(hub, dataclasses.replace(pinned, path=str(folder)), tmp_path))
    here = dataclasses.replace(pinned, path=str(folder))
    assert hub_source(pinned, for_training=True).identity == hub_source(here, for_training=True).identity
    (folder / "stories/validation-00000-of-00001.parquet").write_bytes(b"other")
    other = dataclasses.replace(pinned, path=str(folder), split_seed=1)
    assert "is not the file that dataset.sha256 names" in prepared(hub, other, tmp_path)["error"]


def test_an_evaluation_takes_a_repository_without_a_training_split(pinned: DatasetConfig, tmp_path: Path) -> None:
    test = "stories/test-00000-of-00001.parquet"
    folder = tmp_path / "hub/datasets/someone/stories"
    dataset = dataclasses.replace(pinned, path=str(folder), sha256={test: pinned.sha256[test]})
    code = f"""
import os
import sys

from harness.data.hub import hub_source
from harness.errors import UserError
from harness.config.schema import DatasetConfig

dataset = DatasetConfig(**{dataclasses.asdict(dataset)!r})
print([document.split for document in hub_source(dataset, for_training=False).documents()].count("test"))
try:
    list(hub_source(dataset, for_training=True).documents())
except UserError as error:
    print(error)
# The libraries' threads sometimes abort an interpreter that ends under load; what it did is done.
sys.stdout.flush()
os._exit(0)
"""
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert child.stdout.splitlines() == ["20", "someone/stories has no train split, but test: choose another hub_config"]


def test_wikitext_lines_are_joined_into_articles_and_nothing_is_lost() -> None:
    rows = [
        "",
        " = First = \n",
        "",
        " Text of it . \n",
        "",
        " = = Section = = \n",
        "",
        " More . \n",
        "",
        " = Second ( film ) = \n",
        "",
        " A formula : \n",
        " = 1 rad / s = \n",
        " and so on . \n",
        "",
    ]
    first, second = articles(rows)
    assert first == " \n = First = \n \n Text of it . \n \n = = Section = = \n \n More . \n \n"
    assert second == " = Second ( film ) = \n \n A formula : \n = 1 rad / s = \n and so on . \n \n"
    assert list(articles([])) == list(articles(["", ""])) == []
    assert list(articles([" = Only = \n"])) == [" = Only = \n"]


def test_the_published_wikitext_splits_have_sixty_articles_each() -> None:
    folder = Path(__file__).parents[3] / "shared/data/wikitext"
    if not folder.is_dir():
        pytest.skip("needs ../shared/data/wikitext")
    for split in ("validation", "test"):
        whole = (folder / f"{split}.txt").read_text(encoding="utf-8")
        rows = [line if line.strip() else "" for line in whole.splitlines(keepends=True)]
        assert len(list(articles(rows))) == 60
        assert "".join(articles(rows)).rstrip() == whole.rstrip()


@pytest.mark.parametrize("streamed", [False, True], ids=["downloaded", "streamed"])
def test_neither_a_script_nor_a_pickle_in_a_repository_is_ever_run(
    hub: TimedHub, pinned: DatasetConfig, tmp_path: Path, streamed: bool
) -> None:
    proof = tmp_path / "executed"
    repository = tmp_path / "hub/datasets/someone/stories"
    for name in ("stories.py", "stories/stories.py", "__init__.py"):
        (repository / name).write_text(f"import pathlib\npathlib.Path({str(proof)!r}).touch()\n")
    payload = pickle.dumps(_Touch(str(proof)))
    names = ["stories/validation-00000-of-00001.parquet", "stories/test-00000-of-00001.parquet"]
    for name in names:
        (repository / name).write_bytes(payload)
    sha256 = {} if streamed else pinned.sha256 | dict.fromkeys(names, hashlib.sha256(payload).hexdigest())
    dataset = dataclasses.replace(pinned, sha256=sha256, hub_streaming=streamed)
    answer = prepared(hub, dataset, tmp_path)
    assert answer.get("error") and "\n" not in answer["error"] and not proof.exists()
    pickle.loads(payload)
    assert proof.exists(), "the payload works where pickles are loaded"


class _Touch:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mknod, (self.path,)


def test_a_fault_in_reading_rows_is_no_file_that_cannot_be_read(
    pinned: DatasetConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "hub/datasets/someone/stories"
    (folder / "validation.jsonl").write_text('{"words": {"text": "of a struct"}}\n{"words": \n')

    def first(column: str) -> Document:
        sha256 = {"validation.jsonl": hashlib.sha256((folder / "validation.jsonl").read_bytes()).hexdigest()}
        named = dataclasses.replace(pinned, path=str(folder), sha256=sha256, text_column=column)
        return next(iter(hub_source(named, for_training=False).documents()))

    with pytest.raises(UserError, match=r"validation\.jsonl of someone/stories cannot be read \(.*: choose another dataset"):
        first("words.text")
    (folder / "validation.jsonl").write_text('{"words": {"text": "of a struct"}}\n')
    assert first("words.text") == Document("validation", ("of a struct",))
    with pytest.raises(UserError, match=r"no column 'text', but words: set dataset.text_column"):
        first("text")

    def fault(*_: object) -> list[str]:
        raise KeyError("a fault of ours")

    monkeypatch.setattr(hub_module, "_way", fault)
    with pytest.raises(KeyError, match="a fault of ours"):
        first("words.text")


def test_a_mistake_of_ours_in_what_the_hub_states_is_no_outage_and_a_file_without_a_hash_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def nothing(*_: object, **__: object) -> list[Any]:
        asked.append(1)
        return []

    def fail(_: object) -> None:
        raise ValueError("ours")

    monkeypatch.setattr("huggingface_hub.HfApi.get_paths_info", nothing)
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_tree", nothing)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: SimpleNamespace(sha=REVISION))
    monkeypatch.setattr(hub_client, "connect", lambda *_: None)
    with pytest.raises(UserError, match=r"states no hash of a\.parquet in some/texts: take dataset=stdlib"):
        hub_client.file_hashes("some/texts", ["a.parquet"], REVISION)
    monkeypatch.setattr(hub_client, "_stated", fail)
    with pytest.raises(ValueError, match=r"^ours$"):
        hub_client.file_hashes("some/texts", ["a.parquet"], REVISION)
    with pytest.raises(ValueError, match=r"^ours$"):
        hub_client.model_files("some/model", None)
    assert len(asked) == 3
