"""Rotations stretched to longer contexts, against transformers' own; frequencies kept with the weights; refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from modeling.attention.contract import CHECKS, Build, a_state_dict_brings_the_function_back
from modeling.attention.rope import (
    RotaryEmbedding,
    StoredRotaryEmbedding,
    logit_factor,
    rope_frequencies,
    rotate,
    scaled_frequencies,
)
from tests.support.variants import attention_from

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 2.5},
    "llama3": LLAMA3,
    "llama3, a narrow band": LLAMA3 | {"low_freq_factor": 2.0, "high_freq_factor": 2.5},
    "yarn": YARN,
    "yarn, its own factor": YARN | {"attention_factor": 0.8},
    "yarn, not truncated": YARN | {"truncate": False},
    "yarn, other bounds": YARN | {"beta_fast": 16, "beta_slow": 2},
    "yarn, bounds of zero": YARN | {"beta_fast": 0, "beta_slow": 0},
    "yarn, both mscales": YARN | {"mscale": 0.7, "mscale_all_dim": 0.9},
    "yarn, one mscale": YARN | {"mscale": 0.7},
    "yarn, shorter": YARN | {"factor": 0.5},
    "yarn, all pairs within one turn": YARN | {"original_max_position_embeddings": 4},
}


@pytest.mark.parametrize(("width", "theta"), [(16, 10_000.0), (64, 500_000.0), (6, 100.0)])
@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_frequencies_and_factor_are_transformers(scaling: dict[str, Any], width: int, theta: float) -> None:
    pytest.importorskip("transformers")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(
        hidden_size=4 * width,
        num_attention_heads=4,
        head_dim=width,
        max_position_embeddings=256,
        rope_parameters=scaling | {"rope_theta": theta},
    )
    theirs_F, their_factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config)
    ours_F, factor = scaled_frequencies(width, theta, scaling)
    assert ours_F.dtype == torch.float64 and ours_F.shape == (width // 2,)
    assert ((ours_F - theirs_F.double()).abs() / theirs_F).max() < 1e-5  # theirs are float32
    assert factor == pytest.approx(their_factor, rel=1e-6)


def test_without_scaling_nothing_changes() -> None:
    frequencies_F, factor = scaled_frequencies(16, 10_000.0, None)
    assert torch.equal(frequencies_F, rope_frequencies(16, 10_000.0)) and factor == 1.0


def test_the_logit_factor_is_deepseeks() -> None:
    pytest.importorskip("transformers")
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import yarn_apply_mscale

    for scaling in (*SCALINGS.values(), YARN | {"mscale_all_dim": 0.707}):
        assert logit_factor(scaling) == pytest.approx(yarn_apply_mscale(scaling, 1.0))
    assert logit_factor(None) == 1.0
    assert logit_factor(YARN | {"mscale_all_dim": 1.0}) == pytest.approx((0.1 * math.log(4) + 1) ** 2)


@pytest.mark.parametrize(
    ("scaling", "sentence"),
    [
        ({"factor": 2.0}, r"rope_type=None is unknown here; choose linear, llama3 or yarn"),
        ({"rope_type": "longrope", "factor": 2.0}, r"rope_type=longrope is unknown"),
        ({"rope_type": "linear"}, r"rope_type=linear lacks factor; its fields are factor"),
        (LLAMA3 | {"beta_fast": 32}, r"has beta_fast, which it does not know"),
        ({"rope_type": "yarn", "factor": 2.0}, r"lacks original_max_position_embeddings"),
        (YARN | {"factor": -1.0}, r"rope_scaling.factor=-1.0 must be a number above 0"),
        (YARN | {"factor": None}, r"rope_scaling.factor=None must be a number above 0"),
        (YARN | {"factor": math.inf}, r"rope_scaling.factor=inf must be a number above 0"),
        (YARN | {"factor": True}, r"rope_scaling.factor=True must be a number above 0"),
        (YARN | {"beta_fast": "32"}, r"rope_scaling.beta_fast=32 must be a number above 0"),
        (LLAMA3 | {"high_freq_factor": 1.0}, r"high_freq_factor=1.0 must be above low_freq_factor=1.0"),
    ],
)
def test_a_scaling_that_makes_no_sense_is_refused(scaling: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as refused:
        scaled_frequencies(16, 10_000.0, scaling)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("scaling", [SCALINGS["linear"], LLAMA3, SCALINGS["yarn, its own factor"]])
def test_tables_are_of_the_scaled_frequencies_times_the_factor(scaling: dict[str, Any]) -> None:
    rope = RotaryEmbedding(width=16, max_seq_len=300, theta=500.0, scaling=scaling)
    frequencies_F, factor = scaled_frequencies(16, 500.0, scaling)
    angles_F = 299 * frequencies_F
    assert torch.allclose(rope.cos_SF[299].double(), factor * angles_F.cos(), atol=1e-6)
    assert torch.allclose(rope.sin_SF[299].double(), factor * angles_F.sin(), atol=1e-6)
    before = rope.sin_SF.clone()
    assert torch.equal(rope.to(torch.bfloat16).sin_SF, before)  # no cast rounds them
    x_BTHP = torch.randn(1, 1, 1, 16, generator=torch.Generator().manual_seed(0))
    turned = rotate(x_BTHP, rope.tables(299, 1, None))
    assert turned.norm() == pytest.approx(factor * x_BTHP.norm().item(), rel=1e-5)


def test_stored_frequencies_come_back_with_the_weights_and_no_cast_rounds_them() -> None:
    stored = StoredRotaryEmbedding(width=6, max_seq_len=50, theta=100.0)
    assert torch.equal(stored.get_extra_state(), rope_frequencies(6, 100.0))
    frequencies_F = torch.tensor([0.3, 0.0, 1 / 3], dtype=torch.float64)
    stored.load_state_dict({"_extra_state": frequencies_F})
    assert torch.allclose(stored.cos_SF[49].double(), (49 * frequencies_F).cos(), atol=1e-6)
    other = StoredRotaryEmbedding(width=6, max_seq_len=50, theta=7.0).to(torch.bfloat16)
    other.load_state_dict(stored.to(torch.bfloat16).state_dict())
    assert torch.equal(other.get_extra_state(), frequencies_F) and torch.equal(other.cos_SF, stored.cos_SF)
    with pytest.raises(ValueError, match=r"\(2,\) frequencies were stored for a rotated width of 6"):
        other.set_extra_state(torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize(
    "check",
    # The frequencies are saved, which of all others that check forbids.
    [check for check in CHECKS if check is not a_state_dict_brings_the_function_back],
    ids=lambda check: check.__name__,
)
def test_stored_frequencies_keep_the_contract(check: Callable[[Build], None]) -> None:
    check(lambda: attention_from(["attention=mla", "attention.rope_frequencies=stored"]))
