"""NVIDIA's multi-process service for runs that share a GPU: their kernels run side by side instead of in turns.

It is a service of this study alone, in a folder of its own; settings of the card are left as they are. What it brings:
docs/PERFORMANCE.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from harness.errors import tell
from harness.study.runner import Slot

CONTROL = "nvidia-cuda-mps-control"
# The daemon goes when this shell's standard input ends, which it does when the study's process does, however that happens.
_GUARD = f"{CONTROL} -d || exit 1; echo started; cat > /dev/null; echo quit | {CONTROL}"
# Whether a process can compute through the service: a context on each device, in the driver's own words.
_TRIAL = """
import ctypes, sys
driver = ctypes.CDLL("libcuda.so.1")
count, context = ctypes.c_int(), ctypes.c_void_p()
failed = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
for device in range(count.value):
    failed = failed or driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
sys.exit(1 if failed or not count.value else 0)
"""
TRIAL = (sys.executable, "-c", _TRIAL)
PATIENCE_SECONDS = 20.0


@contextlib.contextmanager
def multi_process_service(places: Sequence[Slot], *, trial: Sequence[str] = TRIAL) -> Iterator[list[Slot]]:
    """The places, each with what its runs need to compute through a service that lasts as long as the block.

    They stay as they are where no two share a GPU, and where the service is not installed or another one is in use. They do
    too, with a word about it, where it does not start or where `trial` fails, a command that computes through it.
    """
    gpus = [place.environment.get("CUDA_VISIBLE_DEVICES") for place in places]
    shared = None not in gpus and len(set(gpus)) < len(gpus)
    if not shared or shutil.which(CONTROL) is None or "CUDA_MPS_PIPE_DIRECTORY" in os.environ:
        yield list(places)
        return
    folder = Path(tempfile.mkdtemp(prefix="gpu-service-"))
    ours = {"CUDA_MPS_PIPE_DIRECTORY": str(folder), "CUDA_MPS_LOG_DIRECTORY": str(folder)}
    # The daemon sees every GPU, so that their names mean to its clients what they mean without it.
    environment = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"} | ours
    guard = subprocess.Popen(
        ["sh", "-c", _GUARD],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # an interruption is for the runs first
    )
    try:
        if _works(guard, trial, os.environ | ours):
            tell(f"runs that share a GPU compute side by side through NVIDIA's multi-process service ({CONTROL})")
            yield [dataclasses.replace(place, environment=place.environment | ours) for place in places]
        else:
            tell("NVIDIA's multi-process service does not start here: runs that share a GPU take turns")
            yield list(places)
    finally:
        assert guard.stdin is not None
        guard.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            guard.wait(PATIENCE_SECONDS)
        shutil.rmtree(folder, ignore_errors=True)


def _works(guard: subprocess.Popen[bytes], trial: Sequence[str], environment: Mapping[str, str]) -> bool:
    assert guard.stdout is not None
    if guard.stdout.readline() != b"started\n":
        return False
    try:
        return subprocess.run(trial, env=environment, capture_output=True, timeout=PATIENCE_SECONDS).returncode == 0
    except subprocess.TimeoutExpired:
        return False
