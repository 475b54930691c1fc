"""Decode times of a study's arms: which rows come of it, what they hold, and what is left out. Nothing about speed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from harness.decode import speed
from harness.decode.subjects import DecodePlan
from harness.study import decode_times as module
from harness.study.decode_times import decode_times
from tests.support.variants import config_at

ARMS = {
    "all_heads": config_at("attention=mha"),
    "table": config_at("attention=mha_learned"),
    "latent": config_at("attention=mla"),
    "late": config_at("attention=mla_plain", "attention.positions=rope_after_up"),
}


@pytest.fixture(autouse=True)
def as_many_steps_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the machine is meanwhile."""
    monkeypatch.setattr(speed, "READING_SECONDS", 1e9)


def timed(*arms: str, **changes: Any) -> list[dict[str, Any]]:
    settings: dict[str, Any] = {
        "vocab_size": 100,
        "contexts": [16],
        "batch_sizes": [1],
        "device": torch.device("cpu"),
        "dtype": torch.float32,
        "max_seconds": 1e9,
    }
    return decode_times({name: ARMS[name] for name in arms or ARMS}, **(settings | changes))


def test_every_arm_has_a_row_for_each_place_on_the_path_it_takes_also_beyond_the_context_it_trained_at() -> None:
    assert ARMS["table"].model.max_seq_len == 64
    rows = timed(contexts=[96, 16], batch_sizes=[2, 1])
    paths = [("all_heads", "auto"), ("table", "auto"), ("latent", "absorbed"), ("late", "expand")]
    assert [(row["context"], row["batch"], row["arm"], row["path"]) for row in rows] == [
        (context, batch, *path) for context, batch in [(16, 1), (16, 2), (96, 1), (96, 2)] for path in paths
    ]
    for row in rows:
        assert 0 < row["low"] <= row["milliseconds"] <= row["high"] < 1e4
        assert (row["n"], row["step"]) == (DecodePlan.rounds * DecodePlan.steps, "eager") and row["device"].startswith("cpu")


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_cache_bytes_are_those_of_all_layers_in_the_dtype(dtype: torch.dtype, width: int) -> None:
    rows = timed("all_heads", "latent", dtype=dtype)
    elements = {"all_heads": 2 * 4 * 12, "latent": 24 + 6}
    assert {(row["arm"], row["cache_bytes_per_token"]) for row in rows} == {
        (arm, 2 * width * count) for arm, count in elements.items()
    }


def test_places_that_the_time_does_not_reach_are_left_out_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert timed("all_heads", "latent", contexts=[32, 16], batch_sizes=[1, 3], max_seconds=0.0) == []
    assert capsys.readouterr().out.splitlines() == [
        f"decode time of every arm at batch {batch}, context {context} left out: the 0 seconds for it were over"
        for context, batch in [(16, 1), (32, 1), (16, 3), (32, 3)]
    ]


def test_what_does_not_fit_into_half_of_the_memory_is_left_out_and_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "memory_bytes", lambda device: 2 * 2**23)
    rows = timed("all_heads", "latent", contexts=[16, 20_000])
    assert [(row["arm"], row["context"]) for row in rows] == [("all_heads", 16), ("latent", 16), ("latent", 20_000)]
    said = capsys.readouterr().out
    assert said.startswith("decode time of all_heads at batch 1, context 20,000 left out: takes about")
    assert len(said.splitlines()) == 1


def test_without_contexts_they_are_multiples_of_the_longest_sequence_trained_on() -> None:
    assert [row["context"] for row in timed("latent", contexts=[])] == [64, 256, 1024]


def test_an_arm_that_asks_for_a_path_is_timed_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARMS, "expanding", config_at("attention=mla", "attention.decode=expand"))
    assert [row["path"] for row in timed("expanding", "latent")] == ["expand", "absorbed"]
