"""Autoregressive generation through the cache: prefill, then one token at a time.

Letters: B batch, T prompt tokens, C vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from modeling.gpt import GPT


def sample(
    logits_BC: Tensor, *, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    """One token id per row, (B,). temperature 0 takes the likeliest; top_k and top_p cut the tail before sampling.

    top_p keeps the smallest set of tokens whose probability reaches it (Holtzman et al. 2020, arXiv 1904.09751).
    """
    if temperature == 0:
        return logits_BC.argmax(dim=-1)
    logits_BC = logits_BC / temperature
    if top_k is not None:
        kth = logits_BC.topk(min(top_k, logits_BC.shape[-1]), dim=-1).values[:, -1:]
        logits_BC = logits_BC.masked_fill(logits_BC < kth, float("-inf"))
    if top_p is not None:
        ordered, order = logits_BC.sort(dim=-1, descending=True)
        probability = ordered.softmax(dim=-1)
        before = probability.cumsum(dim=-1) - probability  # mass of the likelier tokens: the first is always kept
        cut = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits_BC = logits_BC.masked_fill(cut, float("-inf"))
    return torch.multinomial(logits_BC.softmax(dim=-1), 1, generator=generator).squeeze(1)


@torch.inference_mode()
def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    cache_dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Yield the next token of every row, (B,), max_new_tokens times; prompts may differ in length.

    cache_dtype: what the cache holds (None: the parameters' dtype). Raises ValueError for an empty prompt, for settings
    out of range, and when prompt and new tokens exceed the model's max_seq_len.
    """
    _check(model, prompts, max_new_tokens, temperature, top_k, top_p)
    device, dtype = model.embedding.weight.device, cache_dtype or model.embedding.weight.dtype
    longest = max(len(prompt) for prompt in prompts)
    tokens_BT = torch.zeros(len(prompts), longest, dtype=torch.long)
    valid_BT = torch.zeros(len(prompts), longest, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, : len(prompt)] = torch.as_tensor(prompt)
        valid_BT[row, : len(prompt)] = True
    tokens_BT, valid_BT = tokens_BT.to(device), valid_BT.to(device)
    ragged = any(len(prompt) != longest for prompt in prompts)
    cache = model.new_cache(len(prompts), longest + max_new_tokens - 1, dtype=dtype, device=device)

    model.eval()
    logits_BTC = model(tokens_BT, cache, valid_BT=valid_BT if ragged else None)
    last_B = valid_BT.sum(dim=1) - 1
    logits_BC = logits_BTC[torch.arange(len(prompts), device=device), last_B]
    for step in range(max_new_tokens):
        token_B = sample(logits_BC, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
        yield token_B
        if step + 1 < max_new_tokens:
            logits_BC = model(token_B[:, None], cache)[:, -1]


def _check(
    model: GPT, prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float, top_k: int | None,
    top_p: float | None,
) -> None:  # fmt: skip
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError("a prompt has no tokens; give at least one (the end-of-text token starts a fresh text)")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if temperature < 0:
        raise ValueError(f"temperature={temperature} must be 0 (greedy) or above")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1, or null for no cut")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be in (0, 1], or null for no cut")
    longest = max(len(prompt) for prompt in prompts)
    if longest + max_new_tokens - 1 > model.max_seq_len:
        raise ValueError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the model's {model.max_seq_len} "
            f"positions; ask for at most {max(0, model.max_seq_len - longest + 1)} new tokens"
        )
