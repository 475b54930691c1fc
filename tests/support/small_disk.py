"""Trains a run on a disk of its own: python tests/support/small_disk.py SIZE RUNS KEPT MEANWHILE OVERRIDES...

Linux. RUNS is a disk of that size for this process alone, and copied to KEPT in the end, whatever came of the training.
MEANWHILE is a command for a shell beside it, which may mount something else there.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NEW_MOUNTS, NEW_USER = 0x00020000, 0x10000000  # CLONE_NEWNS and CLONE_NEWUSER of linux/sched.h


def main(size: str, runs: str, kept: str, meanwhile: str, overrides: list[str]) -> None:
    ids = {"uid": os.getuid(), "gid": os.getgid()}
    if ctypes.CDLL(None, use_errno=True).unshare(NEW_USER | NEW_MOUNTS):
        raise OSError(ctypes.get_errno(), "no name spaces of its own for this process")
    Path("/proc/self/setgroups").write_text("deny")
    for kind, number in ids.items():  # root in there, who may mount
        Path(f"/proc/self/{kind}_map").write_text(f"0 {number} 1")
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", runs], check=True)
    beside = subprocess.Popen(meanwhile, shell=True)
    sys.argv = ["train_model.py", *overrides]
    try:
        runpy.run_path(str(ROOT / "train_model.py"), run_name="__main__")
    finally:
        beside.kill()
        subprocess.run(["cp", "-a", f"{runs}/.", kept], check=True)


if __name__ == "__main__":
    main(*sys.argv[1:5], sys.argv[5:])
