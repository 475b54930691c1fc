"""What prepare_for_use.sh still has to install, found out before anything is installed: standard library only.

`python harness/entry/packages.py UNFINISHED` writes the requirement lines that pip is to install to the file UNFINISHED, or
no file when the environment has them all. The caller removes the file once pip has succeeded. Found at the start, it
says that pip was cut off: packages that are only half there are then made unknown to pip, which installs them again.
"""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENT_FILES = ("requirements.txt", "requirements-dev.txt")
OLDEST_TORCH = (2, 11)


def required_lines(root: Path) -> list[str]:
    """The `name==version` lines of the requirement files, in their order, without comments."""
    lines = "\n".join((root / file).read_text() for file in REQUIREMENT_FILES).splitlines()
    return [line.split("#")[0].strip() for line in lines if line.split("#")[0].strip()]


def is_installed(line: str) -> bool:
    """True for exactly the pinned version, whatever its local label: 2.13.0+cpu is 2.13.0."""
    name, version = line.split("==")
    try:
        return metadata.version(name).split("+")[0] == version
    except metadata.PackageNotFoundError:
        return False


def usable_torch() -> str | None:
    """The version of a torch that is new enough and can really be imported; None without one."""
    command = [sys.executable, "-P", "-c", "import torch; print(torch.__version__)"]  # apart: a broken torch may crash
    version = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return version if numbers and (int(numbers[1]), int(numbers[2])) >= OLDEST_TORCH else None


def lines_to_install(lines: list[str], *, interrupted: bool) -> list[str]:
    """All lines, without torch's where a usable torch is there; none when each is met and pip was not interrupted."""
    if not interrupted and all(is_installed(line) for line in lines):
        return []
    torch = usable_torch()
    if torch is not None:
        print(f"== torch {torch} is there and is kept")
        lines = [line for line in lines if not line.startswith("torch==")]
    return lines if interrupted or not all(is_installed(line) for line in lines) else []


def is_whole(dist_info: Path) -> bool:
    """True when pip finished this package: INSTALLER is written after the files, RECORD lists them with their sizes."""
    record = dist_info / "RECORD"
    if not (record.is_file() and (dist_info / "INSTALLER").is_file()):
        return False
    rows = csv.reader(record.read_text(encoding="utf-8").splitlines())
    sizes = {dist_info.parent / path: int(size) for path, _, size in rows if size}
    return all(path.is_file() and path.stat().st_size == size for path, size in sizes.items())


def forget_half_installed(site_packages: Path, since: float) -> list[str]:
    """Remove the metadata of packages left half unpacked since that time, so that pip installs them anew; their names.

    A package that nobody touched since then is not pip's unfinished work, whatever its state, and is left alone.
    """
    recent = [folder for folder in site_packages.glob("*.dist-info") if folder.stat().st_mtime >= since]
    half = [folder for folder in recent if not is_whole(folder)]
    for folder in half:
        shutil.rmtree(folder)
    return [folder.name.removesuffix(".dist-info") for folder in half]


def main(argv: list[str]) -> int:
    unfinished = Path(argv[0])
    interrupted = unfinished.exists()
    if interrupted:
        print("== An earlier set-up was cut off: looking for packages that are only half there")
        for scheme in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
            for name in forget_half_installed(Path(scheme), unfinished.stat().st_mtime):
                print(f"== {name} is only half there and is installed again")
    lines = lines_to_install(required_lines(ROOT), interrupted=interrupted)
    if not lines:
        print("== Packages: all there")
        return 0
    temporary = unfinished.with_suffix(".new")
    temporary.write_text("\n".join(lines) + "\n")
    os.replace(temporary, unfinished)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
