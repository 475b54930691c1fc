"""Runs `prepare` in a process of its own: the hub's libraries read HF_ENDPOINT and friends once, when imported."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from harness.config.schema import DatasetConfig, TokenizerConfig

ROOT = Path(__file__).parents[2]
_CHILD = """
import json, sys, time
from pathlib import Path
from harness.data import prepare
from harness.errors import UserError
from harness.config.schema import DatasetConfig, TokenizerConfig

request = json.loads(sys.argv[1])
started = time.monotonic()
try:
    prepared = prepare(
        DatasetConfig(**request["dataset"]), TokenizerConfig(**request["tokenizer"]), Path(request["data_dir"]),
        progress=False,
    )
    answer = {"folder": str(prepared.folder)}
except UserError as error:
    answer = {"error": str(error), "kind": type(error).__name__}
print(json.dumps(answer | {"seconds": time.monotonic() - started, "modules": sorted(sys.modules)}))
"""


def prepare_in_subprocess(
    dataset: DatasetConfig, tokenizer: TokenizerConfig, data_dir: Path, environment: dict[str, str], prelude: str = ""
) -> dict[str, Any]:
    """{folder} or {error, kind}, with the seconds it took and the modules it had imported in the end."""
    request = {"dataset": dataclasses.asdict(dataset), "tokenizer": dataclasses.asdict(tokenizer), "data_dir": str(data_dir)}
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_") and "proxy" not in key.lower()}
    # `datasets` would import torch to stream, which takes longer than all the rest.
    child = subprocess.run(
        [sys.executable, "-c", prelude + _CHILD, json.dumps(request)],
        cwd=ROOT,
        env=clean | {"USE_TORCH": "0"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert child.returncode == 0, child.stderr
    answer: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return answer | {"stderr": child.stderr}
