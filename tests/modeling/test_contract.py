"""Every shipped variant and every knob keeps the contract of modeling/attention/contract.py."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from torch import nn

from modeling.attention.cache import new_cache
from modeling.attention.contract import (
    CHECKS,
    Build,
    Variant,
    no_token_sees_the_future,
    output_has_the_inputs_shape_and_dtype,
)
from tests.support.variants import KNOBS, SHIPPED, attention_from

# Cached elements per token of the shipped variants at SIZES (4 heads of 12, d_model 48), by hand.
SHIPPED_ELEMENTS = {
    "mha": 2 * 4 * 12, "gqa": 2 * 2 * 12, "mqa": 2 * 12, "mha_learned": 2 * 4 * 12, "mha_wide": 4 * (18 + 12),
    "mha_decoupled": 2 * 4 * 12 + 6, "mla_plain": 24, "mla": 24 + 6,
}  # fmt: skip
VARIANTS = {name: [f"attention={name}"] for name in SHIPPED} | {name: knob[0] for name, knob in KNOBS.items()}
ELEMENTS = SHIPPED_ELEMENTS | {name: knob[1] for name, knob in KNOBS.items()}


@functools.cache
def _prototype(variant: str) -> Variant:
    return attention_from(VARIANTS[variant])


def builder(variant: str) -> Build:
    return lambda: copy.deepcopy(_prototype(variant))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check: Callable[[Build], None], variant: str) -> None:
    check(builder(variant))


@pytest.mark.parametrize("variant", ELEMENTS)
def test_cached_elements_are_the_ones_written_down(variant: str) -> None:
    cache = new_cache(builder(variant)(), 1, 4, dtype=torch.bfloat16, device="cpu")
    assert cache.elements_per_token == ELEMENTS[variant]


def test_the_contract_notices_a_leak_from_the_future() -> None:
    class Leaky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.o_proj = nn.Linear(48, 48)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.o_proj(x + x.mean(dim=1, keepdim=True))

    with pytest.raises(AssertionError, match="outputs before token"):
        no_token_sees_the_future(Leaky)


def test_the_contract_notices_outputs_that_are_zero() -> None:
    def zeroed() -> Variant:
        module = builder("mha")()
        module.v_proj.register_forward_hook(lambda *args: args[-1] * 0)
        return module

    with pytest.raises(AssertionError, match="nearly zero"):
        output_has_the_inputs_shape_and_dtype(zeroed)
