"""The cache's size is measured: on its buffers, and on the memory that decoding really keeps alive."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from harness.config.build import build_model
from harness.config.compose import load_train_config
from harness.evaluation.cache_size import measure_cache
from harness.evaluation.model_facts import model_facts
from modeling.attention import attends
from modeling.gpt import GPT
from tests.support.live_bytes import live_bytes_slope
from tests.support.variants import SHIPPED, gpt_from

CONTEXTS = (8, 24)


def _decode(model: GPT, context: int) -> tuple[Any, list[torch.Tensor]]:
    """Prefill half, then token by token; returns the cache and the last logits."""
    cache = model.new_cache(1, context, dtype=torch.float32, device="cpu")
    tokens = torch.arange(context)[None] % model.vocab_size
    pieces = [tokens[:, : context // 2], *tokens[:, context // 2 :].split(1, dim=1)]
    logits = [model(piece, cache)[:, -1].clone() for piece in pieces]
    return cache, logits[-1:]


def _allocated(model: GPT, context: int, width: int = 4) -> int:
    """By hand: what each layer keeps of a token, times the tokens that its window holds, and its state, at SIZES."""
    kept = [width * layer.cache_formula * min(context, getattr(layer, "window", None) or context) for layer in model.attentions]
    states = [4 * 8 * 12 * 12 + width * 3 * (2 * 4 * 12 + 8 * 12) for layer in model.attentions if not attends(layer)]
    return sum(kept) + sum(states)


@pytest.mark.parametrize("attention", SHIPPED)
def test_live_memory_grows_by_exactly_the_measured_bytes_per_token(attention: str) -> None:
    model = gpt_from([f"attention={attention}"]).eval()
    with torch.no_grad():
        slope = live_bytes_slope(lambda context: _decode(model, context), CONTEXTS)
    allocated = [_allocated(model, context) for context in CONTEXTS]
    assert slope == pytest.approx((allocated[1] - allocated[0]) / (CONTEXTS[1] - CONTEXTS[0]), rel=0.01)
    measured = measure_cache(model, dtype=torch.float32)
    assert measured.bytes_per_token == _allocated(model, model.max_seq_len) / model.max_seq_len > 0
    assert measured.bytes_by_context == {context: _allocated(model, context) for context in (1024, 8192, 32768, 131072)}


def test_a_decoder_that_keeps_expanded_keys_and_values_is_found_out() -> None:
    """It reports MLA's small cache and holds every head's keys and values beside it."""
    model = gpt_from(["attention=mla"]).eval()
    attention = model.attentions[0]

    def decode_and_expand(context: int) -> object:
        cache, logits = _decode(model, context)
        latent_BSL = cache[0].buffers["latent"]
        return cache, logits, attention.k_up_proj(latent_BSL), attention.v_up_proj(latent_BSL)

    with torch.no_grad():
        slope = live_bytes_slope(decode_and_expand, CONTEXTS)
    measured = measure_cache(model, dtype=torch.float32).bytes_per_token
    expanded = 4 * (attention.k_up_proj.out_features + attention.v_up_proj.out_features)
    assert slope == pytest.approx(measured + expanded, rel=0.01)
    assert slope > 1.5 * measured


def test_memory_that_no_python_object_holds_is_counted_too() -> None:
    """Decoding with gradients on keeps activations in the autograd graph, out of the garbage collector's sight."""
    model = gpt_from(["attention=mha"]).eval()
    slope = live_bytes_slope(lambda context: model(torch.arange(context)[None]).sum(), CONTEXTS)
    assert slope > 4 * 2 * 48  # at least two float32 activations a token


@pytest.mark.parametrize("attention", SHIPPED)
def test_the_buffers_hold_what_the_formula_says_in_the_dtype_asked_for(attention: str) -> None:
    model = gpt_from([f"attention={attention}"])
    formula = [layer.cache_formula for layer in model.attentions]
    for dtype, width in ((torch.bfloat16, 2), (torch.float32, 4)):
        size = measure_cache(model, dtype=dtype)
        assert size.dtype == dtype
        assert size.held_bytes_per_token == width * sum(formula)
        assert list(size.elements_per_token_by_layer) == formula
        elements = _allocated(model, 64, width) / width / 64
        assert size.bytes_per_token == width * elements and size.bytes_at_context == 64 * size.bytes_per_token
        assert size.elements_per_token_per_layer == elements / len(formula)
        assert isinstance(size.elements_per_token_per_layer, int) == (elements / len(formula)).is_integer()


def test_one_group_is_said_as_one() -> None:
    for variant, said in (("mqa", "as GQA with 1 group)"), ("gqa", "as GQA with 2 groups)")):
        config = load_train_config([f"attention={variant}", "model=tiny"])
        assert said in model_facts(build_model(config, 64), config).cache_line
