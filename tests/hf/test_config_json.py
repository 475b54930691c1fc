"""The one reader of a config.json: what it takes for data, and that its table says what transformers' classes do."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

from harness.errors import UserError
from harness.hf import config_json
from harness.hf.cache import describe_config
from harness.hf.config_json import BY_FORMULA, FAMILIES, IMPORTED, their_json

auto = pytest.importorskip("transformers.models.auto.configuration_auto")


def test_every_family_is_imported_or_counted_by_formula() -> None:
    assert set(IMPORTED) | set(BY_FORMULA) == set(FAMILIES)


@pytest.mark.parametrize("name", IMPORTED)
def test_what_a_file_leaves_out_is_the_default_of_its_class(name: str) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    theirs = {each.name: each.default for each in dataclasses.fields(auto.CONFIG_MAPPING[name])}
    family = FAMILIES[name]
    if family.states:  # their class makes layer_types of it, and keeps no such field
        theirs["full_attention_interval"] = auto.CONFIG_MAPPING[name]().layer_types.index("full_attention") + 1
    assert {field: theirs[field] for field in family.defaults} == family.defaults
    # A default that stands in no table is null there, so that it follows from other fields.
    assert all(theirs.get(field) is None for field in ("num_key_value_heads", "head_dim") if field not in family.defaults) or (
        family.latent
    )
    assert MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name] == family.architecture


def test_what_is_counted_by_formula_has_no_class_to_measure() -> None:
    assert set(BY_FORMULA).isdisjoint(auto.CONFIG_MAPPING_NAMES)


def test_a_file_may_hold_infinity_as_python_writes_it(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"time_step_limit": [0.0, Infinity]}')
    assert their_json(file) == {"time_step_limit": [0.0, math.inf]}


def test_an_infinite_factor_stretches_no_context() -> None:
    config = {
        "model_type": "internlm2",
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }
    scaling = {"rope_scaling": {"original_max_position_embeddings": 8, "factor": math.inf}}
    assert describe_config(config | scaling | {"max_position_embeddings": 16}, name="tested").made_for == 16


@pytest.mark.parametrize("content", ["[1]", "{", "\ud800", '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"])
def test_what_holds_no_object_is_refused_in_one_sentence(content: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content.encode(errors="surrogatepass"))
    with pytest.raises(UserError, match=r"cannot be read as JSON \(.*\): fetch it again$"):
        their_json(file)


def test_a_larger_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_json, "LARGEST_FILE", 10)
    file = tmp_path / "config.json"
    file.write_text('{"a": 100000}')
    with pytest.raises(UserError, match=r"13 bytes are more than 10"):
        their_json(file)
