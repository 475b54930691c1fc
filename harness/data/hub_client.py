"""Files from the Hugging Face hub: bounded waiting, bounded patience, one sentence when it fails.

`huggingface_hub` alone waits 20 to 170 seconds for a hub that is out of reach and gives up at the first 503.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from harness.data.network import HubUnreachable, reason_unreachable
from harness.errors import UserError, in_a_line
from harness.files.atomic import DISK_ERRORS
from harness.files.hashes import file_sha256

_DEFAULT_ENDPOINT = "https://huggingface.co"
_READ_TIMEOUT = "5"  # seconds without a byte, after which a download is resumed
_ATTEMPTS = 3
# What to take in place of a repository of each kind.
_ELSEWHERE = {
    "dataset": "take dataset=stdlib (needs no network), or a folder prepared on another machine with dataset.path=FOLDER",
    "model": "take tokenizer=bpe (needs no network), or a tokenizer.json of this machine with tokenizer.path=FILE",
    "weights": "name a folder of this machine that holds the model",
}

Result = TypeVar("Result")


def endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or _DEFAULT_ENDPOINT


def offline() -> bool:
    """Whether the user forbids the network, in the libraries' own words."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def connect(path: str, what: str, kind: str = "dataset") -> None:
    """Raises HubUnreachable unless the hub answers for `path` in time; then the libraries may be imported.

    `kind`, here and below: dataset, model (its tokenizer) or weights (all of a model).
    """
    if offline():
        remedy = f"unset it, or {_ELSEWHERE[kind]}"
        raise HubUnreachable(f"HF_HUB_OFFLINE is set, and {what} is not in the hub's cache: {remedy}")
    if reason := reason_unreachable(f"{endpoint()}/{path}"):
        raise HubUnreachable(f"{what}: {endpoint()} is out of reach ({reason}): {_remedies(kind)}")
    _set_timeouts()


def retried_hub_call(call: Callable[[], Result], what: str, kind: str = "dataset") -> Result:
    """What a call of the hub's library answers, tried three times; whatever is made of it stands outside.

    Raises UserError at once for what the hub does not have, HubUnreachable for what it breaks off every time.
    """
    for attempt in range(_ATTEMPTS):
        try:
            return call()
        except Exception as error:  # the libraries raise httpx2's, their own, OSError, RuntimeError and ValueError
            if isinstance(error, UserError) or (isinstance(error, OSError) and error.errno in DISK_ERRORS):
                raise
            status = getattr(getattr(error, "response", None), "status_code", None)
            if status in (401, 404) or type(error).__name__ == "DatasetNotFoundError":
                raise UserError(
                    f"{endpoint()} does not have {what}, or wants a token in HF_TOKEN: check name, config and revision"
                ) from error
            if attempt == _ATTEMPTS - 1:
                raise broken_off(what, error, kind) from error
        time.sleep(2**attempt / 2)
    raise AssertionError("the loop returns or raises")


def broken_off(what: str, error: Exception, kind: str = "dataset") -> HubUnreachable:
    return HubUnreachable(
        f"{what} could not be had from {endpoint()} ({in_a_line(error)}): run it again to continue, or {_remedies(kind)}"
    )


def cached_file(repository: str, name: str, revision: str | None, kind: str) -> Path | None:
    """The file in the hub's cache on this machine, if it is there; never asks the network.

    Raises UserError for a repository that nothing on the hub can be called.
    """
    _set_timeouts()
    import huggingface_hub

    try:
        path = huggingface_hub.try_to_load_from_cache(repository, name, revision=revision, repo_type=kind)
    except huggingface_hub.errors.HFValidationError:
        raise UserError(f"{repository} is no name on the hub: correct it to OWNER/NAME, as in its address") from None
    return Path(path) if isinstance(path, str) else None


def hub_file(repository: str, name: str, revision: str | None, what: str, kind: str = "dataset") -> Path:
    """One file in the hub's cache, downloaded into it where it is not there, resuming what broke off."""
    repo_type = "dataset" if kind == "dataset" else "model"
    if cached := cached_file(repository, name, revision, repo_type):
        return cached
    folder = "datasets/" if kind == "dataset" else ""
    connect(f"{folder}{repository}/resolve/{revision or 'main'}/{name}", what, kind)
    import huggingface_hub

    def download() -> str:
        return huggingface_hub.hf_hub_download(repository, name, revision=revision, repo_type=repo_type)

    return Path(retried_hub_call(download, what, kind))


def file_hashes(repository: str, names: list[str], revision: str) -> dict[str, str]:
    """What the hub states of a dataset's files: SHA-256, or git's SHA-1 of a blob for small files outside LFS."""
    import huggingface_hub

    hub = huggingface_hub.HfApi()

    def listed() -> list[Any]:
        return hub.get_paths_info(repository, names, revision=revision, repo_type="dataset")

    stated = _stated(retried_hub_call(listed, f"the hashes of {repository}"))
    if lacking := [name for name in names if name not in stated]:
        raise UserError(f"{endpoint()} states no hash of {lacking[0]} in {repository}: {_remedies('dataset')}")
    return {name: stated[name] for name in names}


def _stated(entries: Iterable[Any]) -> dict[str, str]:
    """The hash of each file among what the hub lists."""
    import huggingface_hub

    files = [entry for entry in entries if isinstance(entry, huggingface_hub.RepoFile)]
    return {file.path: file.lfs.sha256 if file.lfs else file.blob_id for file in files}


def is_model_name(text: str) -> bool:
    """Whether a text has the form of a model's name on the hub, NAME or NAME@REVISION; the network is not asked."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    repository, at, revision = text.partition("@")
    try:
        validate_repo_id(repository)
    except HFValidationError:
        return False
    return bool(revision) or not at


def pretrained_tokenizer(name: str) -> Path:
    """The tokenizer.json of a model on the hub: NAME or NAME@REVISION."""
    repository, _, revision = name.partition("@")
    return hub_file(repository, "tokenizer.json", revision or None, f"the tokenizer.json of {repository}", "model")


def model_files(repository: str, revision: str | None) -> tuple[str, dict[str, str]]:
    """The commit that a revision of a model is (None: its newest), and what the hub states of each file of it.

    That is SHA-256, or git's SHA-1 of a blob for small files outside LFS: see `is_as_stated`.
    """
    what = f"the model {repository}"
    connect(f"api/models/{repository}/revision/{revision or 'main'}", what, "weights")
    import huggingface_hub

    hub = huggingface_hub.HfApi()

    commit = retried_hub_call(lambda: hub.model_info(repository, revision=revision), what, "weights").sha
    assert commit is not None

    def listed() -> list[Any]:
        return list(hub.list_repo_tree(repository, revision=commit, repo_type="model"))

    return commit, _stated(retried_hub_call(listed, what, "weights"))


def is_as_stated(path: Path, stated: str) -> bool:
    """Whether a file is the one of which the hub states this SHA-256, or this SHA-1 of a git blob."""
    if len(stated) == 64:
        return file_sha256(path) == stated
    blob = hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: blob).hexdigest() == stated


def _remedies(kind: str) -> str:
    cached = "HF_HUB_OFFLINE=1 if the hub's cache already has it"
    return f"{_ELSEWHERE[kind]}, or a mirror with HF_ENDPOINT=URL, or {cached}"


def _set_timeouts() -> None:
    """The library reads these once, when it is imported."""
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", _READ_TIMEOUT)
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", _READ_TIMEOUT)
