"""What is matched is matched: achieved against target, for every quantity and free field, and refused where it cannot."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from harness.config.build import build_model
from harness.config.compose import load_train_config
from harness.config.schema import TrainConfig
from harness.errors import UserError
from harness.study.matching import FREE, MatchConfig, match_arm, quantities, with_values
from harness.study.plan import build_plan, load_study

VOCABULARY = 4096


def config(*overrides: str) -> TrainConfig:
    return load_train_config(["model=mini", "tokenizer=bpe", "name=x", *overrides])


def test_quantities_are_those_of_the_model_that_is_trained() -> None:
    for attention in ("mha", "mla", "mla_shared_latent"):
        with torch.device("meta"):
            model = build_model(config(f"attention={attention}"), VOCABULARY)
        sizes = quantities(config(f"attention={attention}"), VOCABULARY)
        assert sizes["params"] == sum(parameter.numel() for parameter in model.parameters())
        cache = model.new_cache(1, 64, dtype=torch.bfloat16, device="meta")
        held = sum(buffer.numel() * buffer.element_size() for layer in cache for buffer in layer.buffers.values())
        assert sizes["kv_bytes"] * 64 == held


@pytest.mark.parametrize(
    ("attention", "vary", "quantity", "target"),
    [
        ("mla", "model.mlp_hidden", "params", "mha"),
        ("mqa", "model.mlp_hidden", "train_flops", "mha"),
        ("mla", "attention.kv_lora_rank", "kv_bytes", "1024"),
        ("gqa", "attention.n_kv_heads", "kv_bytes", "1536"),
        ("mqa", "attention.head_dim, attention.v_head_dim", "kv_bytes", "1024"),
        ("mla", "attention.q_lora_rank", "params", "2500000"),
    ],
)
def test_the_achieved_value_is_the_models_own_and_within_the_tolerance(
    attention: str, vary: str, quantity: str, target: str
) -> None:
    others = {"mha": quantities(config("attention=mha"), VOCABULARY)}
    start = config(f"attention={attention}", *(["attention.q_lora_rank=64"] if "q_lora" in vary else []))
    match = MatchConfig(quantity, target, vary)
    overrides, (matched,) = match_arm("arm", start, [match], vocab_size=VOCABULARY, others=others)
    wanted = others["mha"][quantity] if target == "mha" else float(target)
    composed = config(f"attention={attention}", *overrides)
    assert quantities(composed, VOCABULARY)[quantity] == matched["achieved"]
    assert matched["mismatch"] == pytest.approx(matched["achieved"] / wanted - 1)
    assert abs(matched["mismatch"]) <= 0.01


def test_the_nearest_legal_value_is_taken() -> None:
    for target in (2_400_000, 2_557_632, 2_700_000):
        start, match = (config("attention=mha"), MatchConfig("params", str(target), "model.mlp_hidden", 0.1, multiple_of=8))
        _, (matched,) = match_arm("arm", start, [match], vocab_size=VOCABULARY, others={})
        every = {
            value: quantities(with_values(start, ["model.mlp_hidden"], value), VOCABULARY)["params"]
            for value in range(matched["value"] - 16, matched["value"] + 17, 8)
        }
        assert min(every, key=lambda value: abs(every[value] - target)) == matched["value"]


def test_matches_are_solved_on_top_of_one_another() -> None:
    others = {"mha": quantities(config("attention=mha"), VOCABULARY)}
    matches = [
        MatchConfig("kv_bytes", "512", "attention.kv_lora_rank"),
        MatchConfig("params", "mha", "model.mlp_hidden", multiple_of=8),
    ]
    overrides, _ = match_arm("arm", config("attention=mla"), matches, vocab_size=VOCABULARY, others=others)
    sizes = quantities(config("attention=mla", *overrides), VOCABULARY)
    assert sizes["kv_bytes"] == 512
    assert sizes["params"] == pytest.approx(others["mha"]["params"], rel=0.01)


def test_a_match_that_a_later_one_undoes_is_refused_and_what_is_left_over_is_that_of_the_whole_arm() -> None:
    others = {"mha": quantities(config("attention=mha"), VOCABULARY)}
    params, bytes_ = (
        MatchConfig("params", "mha", "model.mlp_hidden", multiple_of=8),
        MatchConfig("kv_bytes", "512", "attention.kv_lora_rank"),
    )
    with pytest.raises(UserError, match=r"undone by attention\.kv_lora_rank=\d+"):
        match_arm("arm", config("attention=mla"), [params, bytes_], vocab_size=VOCABULARY, others=others)
    params.tolerance = 0.1
    overrides, matched = match_arm("arm", config("attention=mla"), [params, bytes_], vocab_size=VOCABULARY, others=others)
    sizes = quantities(config("attention=mla", *overrides), VOCABULARY)
    assert [match["achieved"] for match in matched] == [sizes["params"], sizes["kv_bytes"]]
    assert matched[0]["mismatch"] == sizes["params"] / others["mha"]["params"] - 1 != 0


@pytest.mark.parametrize("field", FREE)
def test_every_free_field_is_monotone_in_the_quantities_it_is_solved_for(field: str) -> None:
    start = config(
        "attention=mla" if "lora" in field or "rope" in field else "attention=gqa",
        *(["attention.q_lora_rank=64"] if "q_lora" in field else []),
    )
    values = [value for value in FREE[field](start) if value <= 96][::7][:8]
    together = [field, "attention.v_head_dim"] if field == "attention.head_dim" else [field]
    sizes = [quantities(with_values(start, together, value), VOCABULARY) for value in values]
    for quantity in ("params", "train_flops", "kv_bytes"):
        reached = [size[quantity] for size in sizes]
        assert reached == sorted(reached)


def test_what_cannot_be_matched_is_refused_with_the_nearest_there_is() -> None:
    def refusal(attention: str, match: MatchConfig) -> str:
        with pytest.raises(UserError) as caught:
            match_arm("arm", config(f"attention={attention}"), [match], vocab_size=VOCABULARY, others={})
        return str(caught.value)

    assert refusal("gqa", MatchConfig("kv_bytes", "1200", "attention.n_kv_heads")) == (
        "arm arm: attention.n_kv_heads=2 comes nearest, and 1,024 cache bytes per token lie −14.7% from 1,200, outside the "
        "tolerance of 1.0%: raise it, or free another field"
    )
    assert "cannot be varied here; choose from" in refusal("gqa", MatchConfig("kv_bytes", "512", "attention.kv_lora_rank"))
    assert "neither an arm nor a number" in refusal("gqa", MatchConfig("params", "mlaa", "model.mlp_hidden"))
    assert "quantity=bytes is unknown" in refusal("gqa", MatchConfig("bytes", "512", "model.mlp_hidden"))
    assert "must be above 0" in refusal("gqa", MatchConfig("params", "-1", "model.mlp_hidden"))


def test_the_shipped_budget_study_fills_each_level_exactly(tmp_path: Path) -> None:
    plan = build_plan(load_study("kv_budget"), name="kv_budget", command="", runs_dir=tmp_path)
    levels = {"512 bytes": 512, "1,024 bytes": 1024, "1,536 bytes": 1536}
    families: dict[str, set[str]] = {}
    for arm in plan.arms.values():
        assert abs(arm.quantities["params"] / plan.arms["mha"].quantities["params"] - 1) <= 0.01
        if arm.level is not None:
            assert arm.quantities["kv_bytes"] == levels[arm.level]
            families.setdefault(arm.level, set()).add(arm.family)
    assert families == {"512 bytes": {"gqa", "mla"}, "1,024 bytes": {"gqa", "mla", "mqa"}, "1,536 bytes": {"gqa", "mla", "mqa"}}


def test_a_format_that_tells_values_from_keys_is_for_variants_that_cache_both() -> None:
    assert quantities(config("attention=gqa", "cache.dtype=k8v4"), VOCABULARY)["kv_bytes"] > 0
    with pytest.raises(UserError, match=r"^attention=mla: cache.dtype=k8v4 keeps values in bits of their own"):
        quantities(config("attention=mla", "cache.dtype=k8v4"), VOCABULARY)
