"""Starts an entry script again in the project's .venv when the running Python lacks the requirements.

Called before anything else is imported, so: standard library only, and a syntax that Python 3.8 reads, because an old
interpreter must come as far as the sentence that says what to do.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OLDEST, NEWEST = (3, 11), (3, 13)
ESSENTIAL = ("torch", "hydra", "omegaconf", "tokenizers", "safetensors", "numpy", "tqdm")
REQUIRED = (*ESSENTIAL, "transformers", "datasets", "wandb")  # what a machine may lack that trains on copied data
RESTARTED = "_STARTED_AGAIN_IN_VENV"


def enter_environment(also: Sequence[str] = ()) -> None:
    """Return in an interpreter that can run the project; otherwise start again in .venv, or exit with status 2.

    The restart keeps arguments, working directory, environment and process id. `also` names further packages that the
    caller cannot do without (a test runner).
    """
    if sys.platform == "win32":
        print(
            "Windows is not supported (runs are locked, replaced and signalled as POSIX systems do it): use the Windows "
            "Subsystem for Linux (`wsl --install`), and in it `sh prepare_for_use.sh`.",
            file=sys.stderr,
        )
        sys.exit(2)
    restarted = os.environ.pop(RESTARTED, None) is not None  # popped: a child process may have to decide anew
    needed = (*ESSENTIAL, *also)
    if is_supported() and not missing((*REQUIRED, *also)):
        return
    python = venv_python(ROOT / ".venv")
    if python is not None and not restarted and os.path.realpath(sys.prefix) != os.path.realpath(ROOT / ".venv"):
        restart(python)
    if not is_supported():
        leave(f"Python {sys.version_info[0]}.{sys.version_info[1]} cannot run this project")
    if missing(needed):
        leave(f"this Python ({sys.executable}) lacks {', '.join(missing(needed))}")


def is_supported() -> bool:
    return OLDEST <= sys.version_info[:2] <= NEWEST


def missing(packages: Sequence[str]) -> list[str]:
    """Those of the top-level packages that are not installed. Nothing is imported.

    A folder of the same name without an __init__.py (wandb/ holds its runs) counts as a package to Python: not here.
    """
    specs = {package: importlib.util.find_spec(package) for package in packages}
    return [package for package, spec in specs.items() if spec is None or spec.origin is None]


def venv_python(venv: Path) -> Path | None:
    python = venv / "bin" / "python"
    return python if os.access(python, os.X_OK) else None


def restart(python: Path) -> None:
    """This process's command line once more under another interpreter; never returns."""
    arguments = getattr(sys, "orig_argv", [sys.executable, *sys.argv])[1:]  # orig_argv (3.10) knows -u, -X and -m too
    os.environ[RESTARTED] = "1"
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # closed by who started it
            stream.flush()
    os.execv(python, [str(python), *arguments])


def leave(reason: str) -> None:
    print(
        f"{reason}: run `sh prepare_for_use.sh` in {ROOT} (it needs Python 3.11, 3.12 or 3.13 and installs the rest), "
        "or activate the environment that it prepared.",
        file=sys.stderr,
    )
    sys.exit(2)
