"""A command that is killed, at whatever moment and however often, leaves in the end what one that was never killed leaves.

Of convert, import, export, evaluate and prepare, by SIGKILL at random moments, and nothing of the killed ones stays beside.
`--kills N` makes N kills of each in place of the few that the ordinary run of the tests has time for. Training and studies:
tests/entry/test_kills.py, tests/study/test_kills.py.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from scripts import export
from tests.support.attempts import Killer
from tests.support.micro import Workplace

FEW = 4
pytestmark = pytest.mark.timeout(0)
CLOCKS = {"seconds", "extras_seconds", "finished_at", "peak_memory_bytes"}


@pytest.fixture(scope="module")
def killer(killer: Killer) -> Killer:
    """Where there is a run, `source`, and its export."""
    pytest.importorskip("transformers")
    place = killer.place
    place.train("source", "attention=gqa", "attention.n_kv_heads=1", "tokenizer=bpe", "tokenizer.vocab_size=300")
    assert export.main([f"runs_dir={place.runs}", "run=source", f"to={place.folder / 'exported'}"]) == 0
    return killer


def command(place: Workplace, kind: str, name: str) -> tuple[str, list[str], Path]:
    """Program, arguments, and the folder that it makes or adds to."""
    data = [f"data_dir={place.folder / 'data'}"]
    match kind:
        case "evaluate":
            target = place.folder / "evaluated" / name
            if not target.exists():
                shutil.copytree(place.runs / "source", target)
            return "eval_model", [*place.places(), f"run={target}", "extras=[]"], target
        case "convert":
            target = place.folder / "converted" / name
            options = ["method=mha2mla", "kv_lora_rank=16", "qk_rope_head_dim=8", "calibration_tokens=1024"]
            return (
                "scripts.convert",
                [f"runs_dir={place.runs}", "run=source", f"to={target}", "device=cpu", *data, *options],
                target,
            )
        case "import":
            target = place.folder / "imported" / name
            return (
                "scripts.import_hf",
                [
                    f"source={place.folder / 'exported'}",
                    f"to={target}",
                    "tracking=none",
                    "device=cpu",
                    "dataset=local",
                    f"dataset.path={place.corpus}",
                    *data,
                ],
                target,
            )
        case "export":
            target = place.folder / "exports" / name
            return "scripts.export", [f"runs_dir={place.runs}", "run=source", f"to={target}"], target
        case _:
            target = place.folder / "prepared" / name
            return (
                "scripts.prepare_data",
                [
                    "dataset=local",
                    f"dataset.path={place.corpus}",
                    "tokenizer=bpe",
                    "tokenizer.vocab_size=300",
                    f"data_dir={target}",
                ],
                target,
            )


def without_clocks(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_clocks(inner) for key, inner in value.items() if key not in CLOCKS}
    return [without_clocks(inner) for inner in value] if isinstance(value, list) else value


def left(folder: Path) -> dict[str, Any]:
    """Every file below the folder, by its place: JSON without its clocks, all without the folder's own name."""
    found = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"):
        content = file.read_bytes().replace(folder.name.encode(), b"NAME")
        place = str(file.relative_to(folder))
        found[place] = without_clocks(json.loads(content)) if file.suffix == ".json" else content
        if file.suffix == ".jsonl":
            found[place] = [without_clocks(json.loads(line)) for line in content.splitlines()]
    return found


@pytest.mark.parametrize("kind", ["evaluate", "convert", "import", "export", "prepare"])
def test_killed_at_random_moments_and_repeated_a_command_leaves_what_one_never_killed_leaves(
    killer: Killer, kind: str, request: pytest.FixtureRequest
) -> None:
    seed, wanted = random.randrange(2**32), request.config.getoption("--kills") or FEW
    choose, kills, number = random.Random(seed), 0, 0

    def start(name: str, after: float) -> int:
        program, arguments, _ = command(killer.place, kind, name)
        status: int = killer.start(program, arguments, after=after)["status"]
        return status

    assert start("first-0000", after=600) == 0
    begun = time.monotonic()
    assert start("whole-0000", after=600) == 0
    seconds = time.monotonic() - begun
    *_, whole = command(killer.place, kind, "whole-0000")
    expected = left(whole)
    assert expected
    while kills < wanted:
        number += 1
        name, status = f"kills-{number:04}", -9
        for _ in range(4):
            status = start(name, after=choose.uniform(0.0, 1.05 * seconds))
            assert status in (0, -9), seed
            kills += status == -9
            if status == 0:
                break
        if status != 0:
            assert start(name, after=600) == 0, seed
        *_, target = command(killer.place, kind, name)
        assert left(target) == expected, seed
        beside = [path.name for path in target.parent.iterdir() if not re.fullmatch(r"\.?\w+-\d{4}(\.lock)?", path.name)]
        assert beside == [], seed
        shutil.rmtree(target)
    print(f"survived {kills} kills of {number} times {kind} at random moments (seed {seed})")
