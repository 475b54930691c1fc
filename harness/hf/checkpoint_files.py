"""A checkpoint of transformers as files on this machine: from a folder, or from the hub by way of its cache.

config.json is understood before gigabytes are fetched, and weights that are pickled are never loaded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.data import hub_client
from harness.errors import UserError, readable
from harness.files.hashes import file_sha256
from harness.hf.config_json import their_json
from harness.hf.options import describe

CONFIG, INDEX, WEIGHTS, TOKENIZER = "config.json", "model.safetensors.index.json", "model.safetensors", "tokenizer.json"
_TEXT_FILES = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "chat_template.jinja")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class CheckpointFiles:
    """A checkpoint's files on this machine. revision: the hub's commit, None for a local folder."""

    name: str
    revision: str | None
    config: Path
    tokenizer: Path
    shards: tuple[Path, ...]
    index: Path | None
    text: Mapping[str, Path]  # what says how texts are taken, by name

    @property
    def files(self) -> list[Path]:
        return [self.config, self.tokenizer, *([self.index] if self.index else []), *self.shards]

    def hashes(self) -> dict[str, str]:
        """SHA-256 of each file, by name. Raises UserError for one that cannot be read."""
        hashes = {}
        for path in self.files:
            with readable(str(path), "fetch it again"):
                hashes[path.name] = file_sha256(path)
        return hashes


def find_checkpoint(text: str) -> CheckpointFiles:
    """The files of a local folder, or of NAME or NAME@REVISION on the hub, downloaded into the hub's cache.

    A path that exists wins. Raises UserError (HubUnreachable where the hub is out of reach), in one sentence, for files
    that are missing and for weights that are pickled: those are never loaded.
    """
    folder = Path(text).expanduser()
    if folder.is_dir():
        folder = folder.absolute()
        return _in_folder(folder, str(folder), None, str(folder))
    if folder.exists():
        raise UserError(f"source={text} is a file: name the folder that holds its config.json")
    if not hub_client.is_model_name(text):
        raise UserError(f"source={text} does not exist: name a folder with a config.json, or a model on the hub")
    repository, _, revision = text.partition("@")
    if hub_client.offline():  # as it lies in the hub's cache
        config = hub_client.cached_file(repository, CONFIG, revision or None, "model")
        if config is None:
            hub_client.connect(repository, f"source={text}", "weights")  # says that HF_HUB_OFFLINE is set
            raise AssertionError("offline() is true")
        snapshot = config.parent
        return _in_folder(snapshot, repository, snapshot.name, f"{snapshot} (HF_HUB_OFFLINE is set)")
    commit, hashes = hub_client.model_files(repository, revision or None)

    def fetch(name: str) -> Path | None:
        if name not in hashes:
            return None
        path = hub_client.hub_file(repository, name, commit, f"{name} of {repository}", "weights")
        if not hub_client.is_as_stated(path, hashes[name]):
            raise UserError(f"{path} is not what the hub states of {name}: delete it and run this again")
        return path

    return _source(repository, commit, fetch, sorted(hashes), f"{repository} on the hub")


def _in_folder(folder: Path, name: str, revision: str | None, place: str) -> CheckpointFiles:
    def fetch(file: str) -> Path | None:
        return folder / file if (folder / file).is_file() else None

    return _source(name, revision, fetch, sorted(path.name for path in folder.iterdir()), place)


def _source(
    name: str, revision: str | None, fetch: Callable[[str], Path | None], names: Sequence[str], place: str
) -> CheckpointFiles:
    """names: of all files, to say what is there instead."""

    def needed(file: str, remedy: str) -> Path:
        path = fetch(file)
        if path is None:
            raise UserError(f"{place} has no {file}{remedy}")
        return path

    config = needed(CONFIG, ": name the folder of a transformers model")
    describe(their_json(config))  # before gigabytes are fetched
    index = fetch(INDEX)
    if index is not None:
        shard_names = _shards_of(index)
    elif WEIGHTS in names:
        shard_names = [WEIGHTS]
    elif pickled := [other for other in names if other.endswith(_PICKLED)]:
        raise UserError(
            f"{place} has pickled weights only ({pickled[0]}), which can run code when loaded and are not read: convert "
            f"them to safetensors (save_pretrained of transformers writes it)"
        )
    else:
        raise UserError(f"{place} has neither {WEIGHTS} nor {INDEX}: nothing holds the weights")
    tokenizer = needed(TOKENIZER, ", which the run's text is encoded with: save the fast tokenizer beside the weights")
    shards = []
    for shard in shard_names:
        path = fetch(shard)
        if path is None:
            raise UserError(f"{shard}, a shard that {INDEX} names, is not in {place}: fetch it too")
        shards.append(path)
    text = {each: path for each in _TEXT_FILES if each in names and (path := fetch(each)) is not None}
    return CheckpointFiles(name, revision, config, tokenizer, tuple(shards), index, text)


def _shards_of(index: Path) -> list[str]:
    placed = their_json(index).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise UserError(f"{index} has no weight_map, which names the shards: fetch it again")
    names = sorted({str(name) for name in placed.values()})
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*\.safetensors", name):
            raise UserError(f"{index} names {name} as a shard, which is no plain name of a safetensors file: correct it")
    return names
