"""Where the project lies, and paths as users type them."""

from __future__ import annotations

import os
from pathlib import Path

from harness.errors import readable

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"


def user_path(text: str, field: str | None = None) -> Path:
    """A path as typed: from the current folder, else from the project's."""
    path = Path(os.path.expanduser(text))
    with readable(f"{field}={text}" if field else text, "choose another path"):
        if path.is_absolute() or path.exists() or not (ROOT / path).exists():
            return path.absolute()
    return ROOT / path
