"""Whatever stands on a command line or in a run's config.yaml is taken or refused in one sentence."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.config.build import build_model
from harness.config.checks import train_config
from harness.config.compose import load_train_config
from harness.config.identity import flat
from harness.config.run_config import load_run_config, save_run_config
from tests.fuzz.conftest import Fuzzing
from tests.support.micro import SIZE
from tests.support.mutations import ODD_VALUES, mutated_bytes, mutated_value

DEFAULT = dataclasses.asdict(load_train_config(["attention=mla", "tokenizer=bytes", *SIZE]))
GROUPS = ("attention", "model", "dataset", "tokenizer", "optimizer", "schedule", "tracking", "hydra.run.dir")
SYNTAX = (
    "=",
    "+",
    "~",
    "[",
    "]",
    "{",
    "}",
    ",",
    "'",
    '"',
    "${",
    "}",
    "\\",
    ":",
    "null",
    "1e999",
    "*",
    "@",
    "(",
    ")",
    "${derive:'d_model//0'}",
    "${oc.env:HOME}",
    "${seed}",
    "9" * 30,
)
WORDS = st.one_of(st.text(max_size=12), st.lists(st.sampled_from(SYNTAX), max_size=6).map("".join))
ODD = st.sampled_from([value for value in ODD_VALUES if not isinstance(value, int)]).map(str)
VALUES = st.one_of(WORDS, ODD, st.integers().map(str), st.floats().map(str))
KEYS = st.one_of(st.sampled_from(sorted(flat(DEFAULT))), st.sampled_from(GROUPS), WORDS)
OVERRIDES = st.lists(st.tuples(KEYS, VALUES).map("=".join), min_size=1, max_size=3)
PLAIN = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=8,
)


def examples(count: int) -> Any:
    """As many, the same at every run."""
    return settings(max_examples=count, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))


def test_any_override_is_taken_or_refused(fuzzing: Fuzzing) -> None:
    @examples(len(fuzzing.share(8)))
    @given(OVERRIDES)
    def attempt(overrides: list[str]) -> None:
        fuzzing.try_one(repr(overrides), lambda: load_train_config(overrides))

    attempt()


def test_any_value_in_place_of_a_group_is_taken_or_refused(fuzzing: Fuzzing) -> None:
    @examples(len(fuzzing.share(12)))
    @given(PLAIN, st.sampled_from([None, *sorted(DEFAULT)]))
    def attempt(value: Any, group: str | None) -> None:
        fuzzing.try_one(f"{group}={value!r}", lambda: train_config(DEFAULT | {group: value} if group else value))

    attempt()


def test_odd_values_in_a_whole_configuration_are_taken_or_refused_and_so_is_the_model(
    fuzzing: Fuzzing, choice: random.Random
) -> None:
    def attempt(container: dict[str, Any]) -> None:
        config = train_config(container)
        if config.model.n_layers <= 4:
            with torch.device("meta"):
                build_model(config, vocab_size=257)

    for number in fuzzing.share(20):
        container = mutated_value(DEFAULT, choice)
        fuzzing.try_one(f"configuration {number}", lambda: attempt(container))  # noqa: B023


def test_a_damaged_config_yaml_is_read_or_refused(fuzzing: Fuzzing, choice: random.Random, tmp_path: Path) -> None:
    save_run_config(train_config(DEFAULT), tmp_path)
    file = tmp_path / "config.yaml"
    whole = file.read_bytes()
    for number in fuzzing.share(10):
        file.write_bytes(mutated_bytes(whole, choice))
        fuzzing.try_one(f"config.yaml {number}: {file.read_bytes()!r}", lambda: load_run_config(tmp_path), leaves=tmp_path)
