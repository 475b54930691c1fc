"""Every shipped variant and every knob keeps the contract of modeling/attention/contract.py."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from torch import nn

from modeling.attention.contract import (
    CHECKS,
    Build,
    Variant,
    caches_in_few_bits_stay_close,
    every_parameter_gets_a_gradient,
    it_compiles_without_a_graph_break,
    no_token_sees_the_future,
    output_has_the_inputs_shape_and_dtype,
)
from modeling.attention.layer_cache import new_cache
from tests.support.variants import KNOBS, SHIPPED, attention_from, attentions_from

# Cached elements per token of the shipped variants at SIZES (4 heads of 12, d_model 48), by hand.
SHIPPED_ELEMENTS = {
    "mha": 2 * 4 * 12,
    "gqa": 2 * 2 * 12,
    "mqa": 2 * 12,
    "gqa_gated": 2 * 2 * 12,
    "mfa": 2 * 24,
    "tpa": (2 + 2) * (4 + 12),
    "gta": 2 * 12 + 6,
    "tied_kv": 2 * 12,
    "shared_kv": 24,
    "mha_learned": 2 * 4 * 12,
    "mha_wide": 4 * (18 + 12),
    "mha_decoupled": 2 * 4 * 12 + 6,
    "mla_plain": 24,
    "mla": 24 + 6,
    "mla_deepseek": 24 + 6,
    "mla_wide": 24 + 12,
    "gla": 24 + 6,
    "mla_frozen": 24 + 6,
    "mla_slice": 24 + 6,
    "swa_3_1": 2 * 2 * 12,
    "swa_1_1": 2 * 2 * 12,
    "swa_sinks": 2 * 2 * 12,
    "gqa_partial": 2 * 2 * 12,
    "mqa_wide": 2 * 24,
    "gqa_cla": 2 * 2 * 12,
    "gdn_3_1": 0,  # of the first layer: a state
}
VARIANTS = {name: [f"attention={name}"] for name in SHIPPED} | {name: knob[0] for name, knob in KNOBS.items()}
ELEMENTS = SHIPPED_ELEMENTS | {name: knob[1] for name, knob in KNOBS.items()}


@functools.cache
def _prototype(variant: str) -> Variant:
    return attentions_from(VARIANTS[variant])


def builder(variant: str) -> Build:
    return lambda: copy.deepcopy(_prototype(variant))


# Half of the time of all: of knobs .ci/run alone checks these.
LONG = (it_compiles_without_a_graph_break, caches_in_few_bits_stay_close)


@pytest.mark.parametrize(
    ("check", "variant"),
    [
        pytest.param(
            check,
            variant,
            id=f"{check.__name__}-{variant}",
            marks=[pytest.mark.slow] if check in LONG and variant in KNOBS else [],
        )
        for check in CHECKS
        for variant in VARIANTS
    ],
)
def test_contract(check: Callable[[Build], None], variant: str) -> None:
    check(builder(variant))


@pytest.mark.parametrize("variant", ELEMENTS)
def test_cached_elements_are_the_ones_written_down(variant: str) -> None:
    cache = new_cache(attention_from(VARIANTS[variant]), 1, 4, dtype=torch.bfloat16, device="cpu")
    assert cache.elements_per_token == ELEMENTS[variant]


def test_the_contract_notices_a_leak_from_the_future() -> None:
    class Leaky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.o_proj = nn.Linear(48, 48)

        def forward(self, x: torch.Tensor, cache: None, *, valid_BT: None) -> torch.Tensor:
            return self.o_proj(x + x.mean(dim=1, keepdim=True))

    with pytest.raises(AssertionError, match="outputs before token"):
        no_token_sees_the_future(Leaky)


def test_a_parameter_goes_without_a_gradient_only_where_the_class_states_it_and_only_if_it_is_never_trained() -> None:
    def stated(names: tuple[str, ...], *, trained: bool) -> Build:
        def build() -> Variant:
            module = builder("mha")()
            module.frozen = names
            module.k_proj.weight.requires_grad_(trained)
            return module

        return build

    every_parameter_gets_a_gradient(stated(("k_proj.weight",), trained=False))
    for names, trained, sentence in (
        ((), False, r"k_proj.weight gets no gradient"),
        (("k_proj.weight",), True, r"k_proj.weight is stated as frozen and is trained"),
        (("k_proj.weight", "proj.weight"), False, r"\['proj.weight'\] are stated as frozen and are no parameters"),
    ):
        with pytest.raises(AssertionError, match=sentence):
            every_parameter_gets_a_gradient(stated(names, trained=trained))


def test_the_contract_notices_outputs_that_are_zero() -> None:
    def zeroed() -> Variant:
        module = builder("mha")()
        module.v_proj.register_forward_hook(lambda *args: args[-1] * 0)
        return module

    with pytest.raises(AssertionError, match="nearly zero"):
        output_has_the_inputs_shape_and_dtype(zeroed)
