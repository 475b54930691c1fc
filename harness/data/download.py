"""Files from servers that are no hub: bounded waiting, bounded patience, one sentence when it fails."""

from __future__ import annotations

import http.client
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from harness.data.network import HubUnreachable
from harness.errors import UserError
from harness.files.atomic import DISK_ERRORS
from harness.files.hashes import file_sha256

TIMEOUT = 10  # seconds without a byte
ATTEMPTS = 4
_BLOCK = 1 << 20

Result = TypeVar("Result")


def retried_download(read: Callable[[], Result], what: str, place: str, mirror: str) -> Result:
    """What `read` downloads, tried several times. Raises HubUnreachable where it does not come whole.

    place: its server, as the user knows it; mirror: the environment variable that names another one.
    """
    for attempt in range(ATTEMPTS):
        try:
            return read()
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, OSError) and error.errno in DISK_ERRORS:
                raise
            status = error.code if isinstance(error, urllib.error.HTTPError) else None
            gone = status is not None and status < 500 and status != 429
            if gone or attempt == ATTEMPTS - 1:
                raise HubUnreachable(
                    f"{what} could not be had from {place} ({error}): run it again to continue, or set {mirror} to a mirror"
                ) from error
            time.sleep(2**attempt / 2)
    raise AssertionError("the loop returns or raises")


def download(url: str, to: Path, sha256: str, *, what: str, mirror: str, progress: bool) -> None:
    """The file of this SHA-256 at `to`, there whole or not at all; where a try breaks off, the next one goes on.

    what, mirror: see patiently. Raises HubUnreachable where it does not come whole, UserError where it comes as another file.
    """
    to.parent.mkdir(parents=True, exist_ok=True)
    partial = to.with_name(f"{to.name}.{os.getpid()}.partial")
    try:
        for _ in range(2):
            partial.write_bytes(b"")
            with tqdm(unit="B", unit_scale=True, desc=f"{what}: download", disable=not progress) as bar:
                retried_download(lambda bar=bar: _go_on(url, partial, bar), what, url, mirror)  # type: ignore[misc]
            if file_sha256(partial) == sha256:
                os.replace(partial, to)
                return
    finally:
        partial.unlink(missing_ok=True)
    raise UserError(
        f"{what} arrived twice from {url} with content other than its SHA-256 ({sha256[:12]}...): something on the way changes "
        f"it; use another network, or set {mirror} to a mirror"
    )


def _go_on(url: str, partial: Path, bar: tqdm[Any]) -> None:
    """Adds what the file still lacks; a server that sends no parts sends it whole again."""
    begun = partial.stat().st_size
    request = urllib.request.Request(url, headers={"Range": f"bytes={begun}-"} if begun else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
        begun = begun if answer.status == http.HTTPStatus.PARTIAL_CONTENT else 0
        bar.reset(None if answer.length is None else begun + answer.length)
        bar.update(begun)
        with partial.open("ab" if begun else "wb") as file:
            while block := answer.read(_BLOCK):
                file.write(block)
                bar.update(len(block))
        if answer.length:  # an answer that is read in blocks ends early without an error
            raise http.client.IncompleteRead(b"", answer.length)
