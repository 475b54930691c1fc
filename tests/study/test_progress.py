"""How long a study will take: what a run costs besides its tokens is counted, and what ran here before is known."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness.files.text import duration
from harness.study.plan import RunSpec
from harness.study.progress import Pace


def plan(folder: Path, **flops: int) -> Any:
    """Of arms that take so many FLOPs a token; `x` takes 100."""
    arms = {name: SimpleNamespace(quantities={"train_flops": each}) for name, each in ({"x": 100} | flops).items()}
    return SimpleNamespace(folder=folder, arms=arms)


def spec(tokens: int, seed: int = 0, arm: str = "x") -> RunSpec:
    return RunSpec(arm, 0.01, seed, tokens, None, "hash")


def ended(folder: Path, spec: RunSpec, speed: float | None, scoring: float = 0.0) -> RunSpec:
    run = folder / spec.name
    (run / "evaluations").mkdir(parents=True)
    (run / "summary.json").write_text(json.dumps({"tokens_per_second": speed}))
    record = {
        "seconds": 0.75 * scoring,
        "extras_seconds": 0.25 * scoring,
        "dataset": "x",
        "split": "test",
        "data_fingerprint": "d",
        "evaluated_tokens": 100,
        "loss": 1.0,
        "perplexity": 2.7,
        "bits_per_byte": 0.4,
    }
    (run / "evaluations" / "x-test-0.json").write_text(json.dumps(record))
    return spec


def test_a_run_costs_its_tokens_and_what_every_run_costs_besides(tmp_path: Path) -> None:
    pace = Pace(1, plan(tmp_path))
    assert pace.seconds("x", 1000) is None
    pace.learn(ended(tmp_path, spec(10_000), 1000.0), 30.0, 10_000)  # 10 s of training, 20 s of start and evaluation
    assert pace.seconds("x", 10_000) == pytest.approx(30.0)
    assert pace.seconds("x", 100_000) == pytest.approx(120.0), "three times ten would be 300: evaluation does not grow"
    pace.learn(ended(tmp_path, spec(0, seed=1), None), 5.0, 0)
    assert pace.seconds("x", 0, trained=False) == pytest.approx(5.0)
    assert pace.seconds("x", 10_000) == pytest.approx(30.0)


def test_an_arm_of_which_nothing_is_known_takes_longer_by_its_flops(tmp_path: Path) -> None:
    pace = Pace(1, plan(tmp_path, large=400))
    pace.learn(ended(tmp_path, spec(10_000), 1000.0), 10.0, 10_000)
    assert pace.seconds("large", 10_000) == pytest.approx(40.0)
    pace.learn(ended(tmp_path, spec(10_000, arm="large"), 500.0), 20.0, 10_000)
    assert pace.seconds("large", 10_000) == pytest.approx(20.0) and pace.seconds("x", 10_000) == pytest.approx(10.0)


def test_time_left_counts_places_later_phases_and_what_is_under_way(tmp_path: Path) -> None:
    pace = Pace(2, plan(tmp_path))
    pace.learn(ended(tmp_path, spec(10_000, seed=9), 1000.0), 30.0, 10_000)
    specs = [spec(10_000, seed) for seed in (1, 2, 3)]
    assert pace.left(specs, {}, {}) == pytest.approx(45.0)
    assert pace.left(specs, {}, {specs[0].name: 20.0}) == pytest.approx(35.0)
    assert pace.left(specs[:1], {}, {}) == pytest.approx(30.0), "one run is not shared by two places"
    assert pace.left(specs[:1], {specs[0].name: 5_000}, {}) == pytest.approx(25.0)
    pace.later = [spec(40_000, seed=4)]
    assert pace.left(specs, {}, {}) == pytest.approx((3 * 30 + 60) / 2)


def test_before_a_run_has_ended_the_finished_ones_of_the_folder_tell(tmp_path: Path) -> None:
    ended(tmp_path, spec(10_000), 500.0, scoring=8.0)
    pace = Pace(1, plan(tmp_path))
    assert pace.seconds("x", 10_000) == pytest.approx(28.0)
    pace.learn(ended(tmp_path, spec(10_000, seed=1), 1000.0), 30.0, 10_000)
    assert pace.seconds("x", 10_000) == pytest.approx(30.0), "what this command measures takes their place"


@pytest.mark.parametrize(
    ("seconds", "text"), [(40.4, "40 s"), (91, "91 s"), (179, "179 s"), (209, "3 min"), (7140, "119 min"), (7800, "2 h 10 min")]
)
def test_durations_are_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text
