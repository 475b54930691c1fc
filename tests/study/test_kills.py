"""A study that is killed, at whatever moment and however often, has in the end the record of one that was never killed.

Killed are the command alone, its runs alone, or all at one moment; or the command is asked to stop, and continued by the
line that it prints. `--kills N` makes N of them in place of the few that the ordinary run of the tests has time for.
"""

from __future__ import annotations

import random
import re
import shlex
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.entry.test_kills_of_commands import left
from tests.support.attempts import Killer
from tests.support.micro import without_clocks

FEW = 4
pytestmark = [
    pytest.mark.timeout(0),
    pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="looks for processes in /proc"),
]
ARMS = ("mha", "mla")
STUDY = {
    "question": "which?",
    "base": [],
    "seeds": [0, 1],
    "contrasts": [["mla", "mha"]],
    "arms": {arm: {"family": arm, "overrides": [f"attention={arm}"]} for arm in ARMS},
    "match": [{"quantity": "params", "to": "mha", "vary": "model.mlp_hidden", "multiple_of": 8, "tolerance": 0.2}],
    "tune": {"factors": [0.5, 1.0, 2.0], "extensions": 0, "tokens": 2 * 4 * 32},
    "evaluate": ["max_tokens=400", "extras=[repeats]"],
}
RUNS = ["budget.steps=10", "intervals.log=1", "intervals.evaluate=2", "intervals.checkpoint=2", "model.dropout=0.1"]
WAYS: list[tuple[str | None, signal.Signals]] = [
    (None, signal.SIGKILL),
    ("all", signal.SIGKILL),
    ("runs", signal.SIGKILL),
    (None, signal.SIGTERM),
    (None, signal.SIGINT),
]


@pytest.fixture(scope="module")
def killer(killer: Killer) -> Killer:
    """Where there is a study, `small`, whose command has been imported."""
    configs = killer.place.folder / "configs" / "study"
    configs.mkdir(parents=True)
    (configs / "small.yaml").write_text(yaml.safe_dump(STUDY))
    assert Study(killer, "first", "none").start(after=600) == 0
    return killer


class Study:
    """A study of four runs, six of a sweep before them where it is tuned."""

    def __init__(self, killer: Killer, name: str, tune: str) -> None:
        place = killer.place
        self.killer, self.output = killer, place.folder / f"{name}.txt"
        self.folder = place.folder / name / "small"
        machine = [each for each in place.overrides() if not each.startswith(("runs_dir", "budget"))]
        self.command = ["study=small", f"runs_dir={self.folder.parent}", f"tune={tune}", "report=false", *machine, *RUNS]

    def start(self, **how: Any) -> int:
        """Its command, or the one that it printed last, until its end or the signal."""
        self.output.unlink(missing_ok=True)
        arguments = [str(self.killer.place.folder / "configs"), *self.command]
        status: int = self.killer.start("tests.support.small_study", arguments, output=str(self.output), **how)["status"]
        said = self.output.read_text() if self.output.exists() else ""
        if status in (130, 143) and said:
            *_, last, line = said.splitlines()
            if last.endswith("; continue with"):  # before that it says only what it compares
                self.command = shlex.split(line)[2:]
            else:
                assert "started" not in said
        return status

    def record(self) -> dict[str, Any]:
        """study.json and all that is in its runs' folders, without clocks and logs, in which no run fell over."""
        found = left(self.folder.parent)
        record = found["small/study.json"]
        for declared in record["history"]:
            declared["at"] = None
        names = {spec["name"] for spec in record["runs"] + record["sweep"]}
        for place in list(found):
            run, between, step = place.partition("/checkpoints/step-")
            later = f"{run}{between}{step[:8]}~"
            if step and any(other > later for other in found if other.startswith(run + between)):
                del found[place]  # a run that was asked to stop has saved between its intervals
            elif re.search(r"/metrics\.\d+\.jsonl$", place):
                del found[place]  # rows of an attempt that was killed while it wrote its first checkpoint
            elif "/logs/" in place:
                assert b"Traceback" not in found.pop(place), place
            elif place != "small/study.json" and place.split("/")[1] not in names:
                # Of another rate, where a run of the sweep was killed and the study went on without it: seen, and said so.
                del found[place], record["history"][:-1]
                record["history"][-1]["results"] = 0
            elif place.endswith(("/state.json", "/manifest.json")):  # of a checkpoint: seconds, and the sums of them
                found[place] = None
            elif place.endswith("/metrics.jsonl"):
                found[place] = [without_clocks(line) for line in found[place]]
            elif place.endswith(".json"):
                found[place] = without_clocks(found[place])
        return found


# What is done without a sweep is done behind one, too.
@pytest.mark.parametrize("tune", [pytest.param("none", marks=pytest.mark.slow), "lr"])
def test_a_study_killed_at_random_moments_and_continued_has_the_record_of_one_never_killed(
    killer: Killer, tune: str, request: pytest.FixtureRequest
) -> None:
    seed, wanted = random.randrange(2**32), request.config.getoption("--kills") or FEW
    choose, kills, number = random.Random(seed), Counter[str](), 0
    whole, begun = Study(killer, f"whole-{tune}", tune), time.monotonic()
    assert whole.start(after=600) == 0
    seconds, expected = time.monotonic() - begun, whole.record()
    assert "small/study.json" in expected
    while kills.total() < wanted:
        number += 1
        study, status = Study(killer, f"k{number:04}-{tune}", tune), -1
        for _ in range(8):
            whom, signalled = choose.choice(WAYS)
            moment = choose.uniform(0.0, 0.6 * seconds)
            status = study.start(after=moment, whom=whom, signal=signalled)
            if status == 0:
                break
            assert status in ((2,) if whom == "runs" else (-signalled, 128 + signalled)), seed
            kills[f"{whom or 'the command'} by {signalled.name}"] += 1
        if status != 0:
            assert study.start(after=600) == 0, seed
        record = study.record()
        assert record.keys() == expected.keys(), seed
        for place, content in expected.items():  # one by one: what differs is to be read from the failure
            assert record[place] == content, (seed, number, place)
    each = ", ".join(f"{count} of {how}" for how, count in sorted(kills.items()))
    print(f"survived {kills.total()} kills ({each}) of {number} studies with tune={tune} (seed {seed})")
