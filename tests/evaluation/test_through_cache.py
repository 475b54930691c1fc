"""Scoring through a cache is decoding through it: one call a window gives what one token at a time gives."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from harness.evaluation.evaluate import CacheChoice, evaluate_model
from harness.evaluation.perplexity import Scoring, SplitResult, cut_windows, gather
from harness.evaluation.probes.recall import measure_copying
from harness.evaluation.probes.repeats import measure_repeats
from modeling.attention import attends
from modeling.attention.contract import randomise
from modeling.attention.quantisation import cache_format
from modeling.gpt import GPT
from tests.evaluation.test_perplexity import Split, texts_of
from tests.support.subjects import documents, on_cpu, subject_of
from tests.support.variants import SHIPPED_BY_CODE, gpt_from

VOCAB, END, TOKENS = 100, 99, 150
CHOICES = {
    "int8": CacheChoice(torch.int8),
    "fp8": CacheChoice(torch.float8_e4m3fn),
    "bfloat16": CacheChoice(torch.bfloat16),
    "window": CacheChoice(torch.float32, window=9, sinks=3),
    "int8 window": CacheChoice(torch.int8, window=9),
    "rotated int4 window": CacheChoice(cache_format("int4_rotated"), window=9, sinks=3),
}


def split() -> Split:
    tokens = np.random.default_rng(0).integers(0, END, TOKENS).astype(np.uint16)
    tokens[-1] = END
    one = np.array([2 * TOKENS])
    return Split(tokens, np.array([0, TOKENS]), one, one)


def built(variant: str, context: int = 64) -> GPT:
    return randomise(gpt_from([f"attention={variant}", f"model.max_seq_len={context}"], VOCAB)).eval()


@torch.no_grad()
def decoded_one_by_one(model: GPT, choice: CacheChoice) -> float:
    """Mean nats, every window a row that is decoded from an empty cache, a token at a time; windows overlap by half."""
    text = split()
    windows = cut_windows(np.array([0, TOKENS]), max_seq_len=model.max_seq_len, stride=model.max_seq_len // 2)
    rows, length = len(windows.start), model.max_seq_len
    assert rows > 2 and (windows.length == length).all()
    inputs_BT, targets_BT = map(torch.from_numpy, gather(text.tokens, windows, np.arange(rows), end_of_text=END))
    cache = model.new_cache(rows, length, dtype=choice.dtype, device="cpu", window=choice.window, sinks=choice.sinks)
    logits_BTC = torch.stack([model(token_B1, cache)[:, -1] for token_B1 in inputs_BT.split(1, dim=1)], dim=1)
    nats_BT = torch.nn.functional.cross_entropy(logits_BTC.flatten(0, 1), targets_BT.flatten(), reduction="none").view(rows, -1)
    scored_BT = torch.arange(length) >= torch.from_numpy(windows.skip)[:, None]
    assert scored_BT.sum() == TOKENS
    return nats_BT[scored_BT].double().mean().item()


@pytest.mark.parametrize("kind", CHOICES)
@pytest.mark.parametrize("variant", SHIPPED_BY_CODE)
def test_one_call_a_window_is_one_token_at_a_time(variant: str, kind: str) -> None:
    model = built(variant, context=24)
    choice = CHOICES[kind]

    def loss(through: CacheChoice | None) -> float:
        return evaluate_model(on_cpu(model), split(), texts_of(END), Scoring(0.5, batch_size=3), through=through).loss

    if choice.window is not None and not all(map(attends, model.attentions)):
        with pytest.raises(ValueError, match="window=9 would hide tokens that state, tail of GatedDeltaNet holds"):
            loss(choice)
        return
    through = loss(choice)
    assert through == pytest.approx(decoded_one_by_one(model, choice), rel=2e-4)
    assert through != loss(None)


@pytest.mark.parametrize(
    ("variant", "window"), [("gqa", None), ("gqa", 9), ("gqa_cla", None), ("tpa", None), ("gdn_3_1", None), ("swa_3_1", None)]
)
def test_keys_by_channel_are_scored_as_they_are_decoded(variant: str, window: int | None) -> None:
    model = built(variant)
    choice = CacheChoice(cache_format("kc4v8"), window)
    result = evaluate_model(on_cpu(model), split(), texts_of(END), Scoring(0.5, batch_size=3), through=choice)
    assert result.loss == pytest.approx(decoded_one_by_one(model, choice), rel=2e-4)
    assert result.loss != result.beside[0].loss


@torch.no_grad()
def test_the_divergence_is_the_mean_kl_over_the_scored_tokens_and_what_is_without_a_cache_stands_beside() -> None:
    """By hand: both distributions of every token in float64, whole windows apart so that each token is scored once."""
    model = built("gqa")
    choice, text = CacheChoice(cache_format("k8v4")), split()

    def score(through: CacheChoice | None) -> SplitResult:
        return evaluate_model(on_cpu(model), text, texts_of(END), Scoring(1.0, batch_size=2), through=through)

    result = score(choice)
    without, divergence = result.beside
    plain = score(None)
    assert (without.loss, without.loss_by_position) == (plain.loss, plain.loss_by_position) and plain.beside == ()
    total = 0.0
    windows = cut_windows(np.array([0, TOKENS]), max_seq_len=model.max_seq_len, stride=model.max_seq_len)
    for window in range(len(windows.start)):
        inputs, _ = map(torch.from_numpy, gather(text.tokens, windows, np.array([window]), end_of_text=END))
        log_q = model(inputs)[..., :VOCAB].double().log_softmax(dim=-1)
        log_p = model(inputs, choice.cache(model, *inputs.shape))[..., :VOCAB].double().log_softmax(dim=-1)
        total += (log_q.exp() * (log_q - log_p)).sum(dim=-1)[0, windows.skip[window] :].sum().item()
    assert divergence.loss == pytest.approx(total / TOKENS, rel=1e-4) and divergence.loss > 1e-4


def test_a_probe_decodes_through_the_cache_that_its_subject_names() -> None:
    model = built("gqa")
    text = documents(*np.tile(np.random.default_rng(0).integers(0, END, (8, 16)), (1, 2)), end_of_text=END)
    subject = subject_of(model, text, end_of_text=END)
    kinds = (None, CacheChoice(torch.float32), CacheChoice(cache_format("int4")))
    plain, exact, coarse = (measure_repeats(dataclasses.replace(subject, through=through)) for through in kinds)
    assert plain is not None and exact is not None and coarse is not None
    assert exact["repeat_loss"] == pytest.approx(plain["repeat_loss"], rel=1e-5)
    assert coarse["repeat_loss"] != pytest.approx(plain["repeat_loss"], rel=1e-4)
    copied, through = (measure_copying(dataclasses.replace(subject, through=kind), {64: model}) for kind in kinds[1:])
    assert copied is not None and through is not None and copied[0]["second_loss"] != through[0]["second_loss"]
