"""What a dashboard can be told, whichever it is."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from harness.errors import UserError


class DashboardError(Exception):
    """What a dashboard's own library raised, in a line."""


# What a run goes on after without its dashboard: the library, the system, or a file. Anything else is a fault of the code.
FAILURES = (DashboardError, OSError, UserError)


@contextlib.contextmanager
def library() -> Iterator[None]:
    """Around nothing but calls of a dashboard's library, which may raise anything: a DashboardError."""
    try:
        yield
    except Exception as error:
        raise DashboardError(_first_line(error)) from error


@dataclass(frozen=True)
class RunDescription:
    """Under what a dashboard files a run. config: nested plain values."""

    project: str
    entity: str | None
    group: str
    name: str
    notes: str | None
    tags: list[str]
    job_type: str
    config: Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """Rows of plain values under named columns."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


class Dashboard(Protocol):
    """One open run. Everything but `give_up` and `close` may raise FAILURES: the tracker catches them."""

    label: str  # the dashboard's name in what is said to people
    run_id: str | None  # W&B's name for the run
    is_online: bool  # W&B alone: rows go to a server, which may have some of them already

    def log(self, row: Mapping[str, float], step: int) -> None:
        """One row of metrics; rows of one step belong together."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Final figures; keys that are there already are replaced."""

    def table(self, key: str, table: Table) -> None: ...

    def scatter(self, key: str, table: Table, *, x: str, y: str, title: str) -> None:
        """A chart of two of the table's columns that can be zoomed and pointed at, where the dashboard has such."""

    def image(self, key: str, path: Path, caption: str) -> None:
        """From a PNG file."""

    def page(self, key: str, path: Path) -> None:
        """From an .html file."""

    def give_up(self) -> None:
        """From now on nothing is sent; `close` still ends what was begun."""

    def close(self, exit_code: int) -> bool:
        """Whether the dashboard has everything, or will have it by the command that was said when the run began."""


def _first_line(error: BaseException) -> str:
    """An error in a line without its full stop."""
    if type(error).__name__ == "ValidationError" and callable(errors := getattr(error, "errors", None)):
        return _refused_setting(errors()[0])
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _refused_setting(details: Mapping[str, Any]) -> str:
    """A setting that W&B's client does not accept and what it would, from pydantic, whose first line says neither."""
    name = ".".join(str(part) for part in details["loc"])
    variable = f"WANDB_{name.upper()}"
    # Of a setting with fixed choices the value is shown too: of others it may be an API key.
    value = f"={details['input']}" if details["type"] == "literal_error" else ""
    message = details["msg"][:1].lower() + details["msg"][1:]
    return f"{variable if variable in os.environ else name}{value}: {message.rstrip('.')}"


def command_of(name: str, module: str) -> list[str]:
    """The beginning of a command that can be typed: `name` if it is on the path, else its module, if it is one."""
    return [name] if shutil.which(name) else [sys.executable, *(["-m", module] if module else [])]


def without_repeats(tags: Sequence[str]) -> list[str]:
    """Tags in their order, each once, none empty, none longer than W&B's limit of 64 characters."""
    return [tag for tag in dict.fromkeys(tag.strip()[:64] for tag in tags) if tag]
