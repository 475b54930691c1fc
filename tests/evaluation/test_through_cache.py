"""Scoring through a cache is decoding through it: one call a window gives what one token at a time gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from harness.evaluation.evaluate import CacheChoice, evaluate_model
from harness.evaluation.perplexity import Scoring, cut_windows, gather
from modeling.attention import attends
from modeling.attention.contract import randomise
from modeling.gpt import GPT
from tests.evaluation.test_perplexity import Split, texts_of
from tests.support.subjects import on_cpu
from tests.support.variants import SHIPPED, gpt_from

VOCAB, END, TOKENS = 100, 99, 150
CHOICES = {
    "int8": CacheChoice(torch.int8),
    "fp8": CacheChoice(torch.float8_e4m3fn),
    "bfloat16": CacheChoice(torch.bfloat16),
    "window": CacheChoice(torch.float32, window=9, sinks=3),
    "int8 window": CacheChoice(torch.int8, window=9),
}


def split() -> Split:
    tokens = np.random.default_rng(0).integers(0, END, TOKENS).astype(np.uint16)
    tokens[-1] = END
    one = np.array([2 * TOKENS])
    return Split(tokens, np.array([0, TOKENS]), one, one)


@torch.no_grad()
def decoded_one_by_one(model: GPT, choice: CacheChoice, stride: int) -> float:
    """Mean nats, every window a row that is decoded from an empty cache, a token at a time."""
    text = split()
    windows = cut_windows(np.array([0, TOKENS]), max_seq_len=model.max_seq_len, stride=stride)
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
@pytest.mark.parametrize("variant", SHIPPED)
def test_one_call_a_window_is_one_token_at_a_time(variant: str, kind: str) -> None:
    model: GPT = randomise(gpt_from([f"attention={variant}"], VOCAB)).eval()
    choice = CHOICES[kind]

    def loss(through: CacheChoice | None) -> float:
        return evaluate_model(on_cpu(model), split(), texts_of(END), Scoring(0.5, batch_size=3), through=through).loss

    if choice.window is not None and not all(map(attends, model.attentions)):
        with pytest.raises(ValueError, match="window=9 would hide tokens that state, tail of GatedDeltaNet holds"):
            loss(choice)
        return
    through = loss(choice)
    assert through == pytest.approx(decoded_one_by_one(model, choice, stride=32), rel=2e-4)
    assert through != loss(None)
