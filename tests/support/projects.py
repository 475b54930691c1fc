"""Copies of the project, and a small project of its own around the real set-up scripts, to be tried out by tests."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BASE_PYTHON = Path(sys.base_prefix) / "bin" / f"python{sys.version_info[0]}.{sys.version_info[1]}"
NOT_COPIED = (".git", ".venv", "runs", "artifacts", "wandb", "outputs", "multirun", "__pycache__", ".*_cache")
REQUIRED = ("torch", "hydra", "omegaconf", "tokenizers", "safetensors", "numpy", "tqdm", "transformers", "datasets", "wandb")


def copy_project(folder: Path) -> Path:
    """The checkout as it is, without environment, data, runs and local choices."""
    at_the_top, anywhere = shutil.ignore_patterns(*NOT_COPIED), shutil.ignore_patterns("__pycache__")
    shutil.copytree(  # harness/runs is no folder of runs
        ROOT, folder, ignore=lambda place, names: (at_the_top if Path(place) == ROOT else anywhere)(place, names)
    )
    shutil.rmtree(folder / "configs" / "local", ignore_errors=True)
    return folder


def block(document: str, marker: str) -> str:
    """The fenced block of a document behind <!-- marker -->."""
    text = (ROOT / document).read_text(encoding="utf-8")
    found = re.search(rf"<!-- {re.escape(marker)} -->\n```\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert found, f"{document} has no block marked {marker}"
    return found[1]


def make_environment(folder: Path, packages: Sequence[str] = ()) -> Path:
    """A virtual environment without pip that holds empty packages of these names; its python."""
    subprocess.run([BASE_PYTHON, "-m", "venv", "--without-pip", folder], check=True)
    for package in packages:
        module = site_packages(folder) / package / "__init__.py"
        module.parent.mkdir()
        module.touch()
    return folder / "bin" / "python"


def site_packages(environment: Path) -> Path:
    return next((environment / "lib").glob("python3.*")) / "site-packages"


def make_wheel(folder: Path, name: str, version: str, files: dict[str, str], requires: str | None = None) -> None:
    """A wheel of plain Python files that pip installs like any other."""
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    contents = files | {
        f"{info}/METADATA": metadata + (f"Requires-Dist: {requires}\n" if requires else ""),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for path, text in contents.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        record += f"{path},sha256={digest},{len(text.encode())}\n"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for path, text in contents.items():
            wheel.writestr(path, text)
        wheel.writestr(f"{info}/RECORD", record + f"{info}/RECORD,,\n")


class SmallProject:
    """The real prepare_for_use.sh on a bare machine: the base interpreter, as `python3`, and a few tools on the PATH.

    The requirements are tiny wheels, and the data step only notes how it was called.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = folder / ".venv"
        self.bin = folder.parent / f"{folder.name}-bin"
        self.wheels = folder.parent / f"{folder.name}-wheels"
        for made in (folder / "harness" / "entry", folder / "scripts", self.bin, self.wheels):
            made.mkdir(parents=True)
        shutil.copy(ROOT / "prepare_for_use.sh", folder)
        shutil.copy(ROOT / "harness" / "entry" / "packages.py", folder / "harness" / "entry")
        (folder / "scripts" / "prepare_data.py").write_text(
            "import json, os, sys\n"
            "from pathlib import Path\n"
            "note = {'argv': sys.argv[1:], 'prefix': sys.prefix, 'folder': os.getcwd()}\n"
            "(Path(__file__).parent / 'called.json').write_text(json.dumps(note))\n"
        )
        (folder / "requirements.txt").write_text("torch==2.13.0\nalpha==1.0  # needs gamma\n")
        (folder / "requirements-dev.txt").write_text("# tests\nbeta==2.0\n")
        make_wheel(self.wheels, "torch", "2.13.0", {"torch/__init__.py": "__version__ = '2.13.0'\n"})
        make_wheel(self.wheels, "alpha", "1.0", {f"alpha/part{i}.py": f"x = {i}\n" for i in range(200)}, "gamma")
        make_wheel(self.wheels, "beta", "2.0", {"beta/__init__.py": ""})
        make_wheel(self.wheels, "gamma", "3.0", {"gamma/__init__.py": ""})
        for tool in ("sh", "dirname", "rm"):
            self.put_on_path(tool, f'exec "{shutil.which(tool)}" "$@"')
        self.put_on_path("python3", f'exec "{BASE_PYTHON}" "$@"')

    def put_on_path(self, name: str, script: str) -> None:
        (self.bin / name).write_text(f"#!/bin/sh\n{script}\n")
        (self.bin / name).chmod(0o755)

    def environ(self, **more: str) -> dict[str, str]:
        return {
            "PATH": str(self.bin),
            "HOME": str(self.folder.parent),
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": self.wheels.as_uri(),
            "PIP_NO_CACHE_DIR": "1",
            "PIP_NO_COMPILE": "1",
        } | more

    def command(self, *arguments: str) -> list[str]:
        return ["/bin/sh", str(self.folder / "prepare_for_use.sh"), *arguments]

    def set_up(self, *arguments: str, folder: Path | None = None, **more: str) -> subprocess.CompletedProcess[str]:
        command, environ = self.command(*arguments), self.environ(**more)
        return subprocess.run(command, cwd=folder or self.folder, env=environ, capture_output=True, text=True)

    def need_no_packages(self) -> None:
        """Empty requirements and environments without pip: a set-up of a tenth of a second."""
        for file in ("requirements.txt", "requirements-dev.txt"):
            (self.folder / file).write_text("")
        self.put_on_path("python3", f'[ "$2" != venv ] || set -- "$@" --without-pip\nexec "{BASE_PYTHON}" "$@"')

    def data_step(self) -> dict[str, Any]:
        """How the data step was called; an AssertionError when it was not."""
        note = self.folder / "scripts" / "called.json"
        assert note.exists(), "the data step was never reached"
        called: dict[str, Any] = json.loads(note.read_text())
        note.unlink()
        return called


def installed(environment: Path) -> dict[str, str]:
    """Name -> version of what pip knows in an environment, pip's own packages left out."""
    names = (folder.name.removesuffix(".dist-info") for folder in site_packages(environment).glob("*.dist-info"))
    versions = dict(name.rsplit("-", 1) for name in names)
    return {name: version for name, version in versions.items() if name not in ("pip", "setuptools")}
