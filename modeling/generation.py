"""Autoregressive generation through the cache: prefill, then one token at a time.

Letters: B batch, T prompt tokens, C vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from modeling.attention.cache import Cache
from modeling.attention.positions import beyond
from modeling.attention.quantisation import CacheFormat
from modeling.compiling import compile_each
from modeling.gpt import GPT
from modeling.kernels.decode_kernels import check_capture
from modeling.refusal import Refusal

COLDEST, HOTTEST = 1e-3, 1e30  # logits divided by less, or a temperature above, leave the range of float32


def sample(
    logits_BC: Tensor, *, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    """One token id per row, (B,). temperature 0 takes the likeliest; top_k and top_p cut the tail before sampling.

    top_p keeps the smallest set of tokens whose probability reaches it (Holtzman et al. 2020, arXiv 1904.09751); 1 all of
    them.
    """
    if temperature == 0:
        return logits_BC.argmax(dim=-1)
    logits_BC = logits_BC / temperature
    if top_k is not None:
        kth = logits_BC.topk(min(top_k, logits_BC.shape[-1]), dim=-1).values[:, -1:]
        logits_BC = logits_BC.masked_fill(logits_BC < kth, float("-inf"))
    if top_p is not None and top_p < 1:  # rounded sums reach 1 before the last tokens
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
    stop: int | None = None,
    cache_dtype: torch.dtype | CacheFormat | None = None,
    window: int | None = None,
    sinks: int = 0,
    step: str = "auto",
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Yield the next token of every row, (B,), max_new_tokens times at most; prompts may differ in length.

    stop: a row that has drawn this token is finished, takes no more room and yields it again; when all have, that is
    the end. cache_dtype: what the cache holds (None: the parameters' dtype; modeling/attention/quantisation.py has all), window
    and sinks likewise. step: how one token is computed, `eager`, `compile` (torch.compile) or `graph` (a CUDA graph);
    `auto` takes the graph on CUDA and eager elsewhere. Raises Refusal for an empty prompt, for settings out of range,
    when prompt and new tokens exceed the model's max_seq_len, and for a model whose logits are not finite.
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
    cache = model.new_cache(len(prompts), longest + max_new_tokens - 1, dtype=dtype, device=device, window=window, sinks=sinks)

    model.eval()
    x_BTD = model.hidden(tokens_BT, cache, valid_BT=valid_BT if ragged else None)
    last_B = valid_BT.sum(dim=1) - 1  # the head sees one position a row, not the whole prompt
    logits_BC = model.logits(x_BTD[torch.arange(len(prompts), device=device), last_B])
    if not logits_BC[:, : model.vocab_size].isfinite().all():
        raise Refusal("the model's logits are not finite: its weights are broken, use an earlier checkpoint")
    running_B = torch.ones(len(prompts), dtype=torch.bool, device=device)
    decode: Callable[[Tensor, Tensor | None], Tensor] | None = None
    for number in range(max_new_tokens):
        token_B = sample(logits_BC, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
        if stop is not None:
            token_B = torch.where(running_B, token_B, stop)
        yield token_B
        if number + 1 == max_new_tokens:
            return
        if stop is not None:
            running_B = running_B & (token_B != stop)
            if not running_B.any():
                return
        if decode is None:
            decode = decode_step(model, cache, step, token_B, None if stop is None else running_B)
        logits_BC = decode(token_B, None if stop is None else running_B)


def decode_step(
    model: GPT,
    cache: Sequence[Cache],
    step: str,
    token_B: Tensor,
    running_B: Tensor | None,
    *,
    forward: Callable[..., Tensor] | None = None,
) -> Callable[[Tensor, Tensor | None], Tensor]:
    """A function (token_B, running_B) -> logits_BC that appends one token a row to a filled cache.

    Rows that are not running take in nothing. `compile` and `graph` make the cache static. token_B and running_B are
    examples of what the function will be given. forward: (tokens_BT, cache, valid_BT=) -> logits_BTC, of the model's own unless
    given. Raises Refusal where `step` cannot run; the function raises it for a token beyond the cache or the model.
    """
    device = token_B.device
    if step == "auto":
        step = "graph" if device.type == "cuda" else "eager"
    if step not in ("eager", "compile", "graph"):
        raise Refusal(f"step={step} is unknown; choose auto, eager, compile or graph")
    if step == "graph":
        for attention in model.attentions:
            check_capture(attention.kernel)
        if device.type != "cuda":
            raise Refusal(f"step=graph needs a CUDA device, not {device.type}; take step=compile or step=eager")

    def eager(token_B: Tensor, running_B: Tensor | None) -> Tensor:
        valid_BT = None if running_B is None else running_B[:, None]
        return compute(token_B[:, None], cache, valid_BT=valid_BT)[:, -1]

    compute: Callable[..., Tensor] = forward or model
    if step == "eager":
        return eager
    for layer in cache:
        layer.make_static()
    if step == "compile":
        compute = compile_each(compute, fullgraph=True)
        return _counted(eager, model, cache)
    _check_fits(model, cache)
    return _counted(_captured(eager, cache, token_B, running_B), model, cache)


def _counted(
    step: Callable[[Tensor, Tensor | None], Tensor], model: GPT, cache: Sequence[Cache]
) -> Callable[[Tensor, Tensor | None], Tensor]:
    """The step with its tokens counted out here, where a token that does not fit can be refused and no device is asked."""

    def counted(token_B: Tensor, running_B: Tensor | None) -> Tensor:
        _check_fits(model, cache)
        logits_BC = step(token_B, running_B)
        for layer in cache:
            layer.count(1)
        return logits_BC

    return counted


def _check_fits(model: GPT, cache: Sequence[Cache]) -> None:
    """Raises Refusal unless the cache, whose layers grow together, and the model have a place for one more token a row."""
    for layer in cache:  # those with a window always have
        layer.check_room(1)
    if isinstance(model, GPT) and any(attention.positions != "none" for attention in model.attentions):
        longest = cache[0].longest(model.max_seq_len - 1)
        if longest >= model.max_seq_len:
            raise beyond(longest, model.max_seq_len)


def _captured(
    step: Callable[[Tensor, Tensor | None], Tensor], cache: Sequence[Cache], token_B: Tensor, running_B: Tensor | None
) -> Callable[[Tensor, Tensor | None], Tensor]:
    """The step as a CUDA graph: one launch a token. What the warm-up took in is taken back before the capture."""
    inputs = [tensor.clone() for tensor in (token_B, running_B) if tensor is not None]
    arguments = (inputs[0], inputs[1] if running_B is not None else None)
    changed = [tensor for layer in cache for tensor in (layer.lengths_B, *layer.tensors())]
    before = [tensor.clone() for tensor in changed]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # each from the state before: there may be room for one token alone
            step(*arguments)
            for tensor, value in zip(changed, before, strict=True):
                tensor.copy_(value)
            for layer in cache:
                layer.count(-1)
    torch.cuda.current_stream().wait_stream(stream)
    del before
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits_BC = step(*arguments)

    def replay(token_B: Tensor, running_B: Tensor | None) -> Tensor:
        given = [tensor for tensor in (token_B, running_B) if tensor is not None]
        for own, new in zip(inputs, given, strict=True):
            own.copy_(new)
        graph.replay()
        return logits_BC.clone()

    return replay


def _check(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> None:
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise Refusal("a prompt has no tokens; give at least one (the end-of-text token starts a fresh text)")
    if max_new_tokens < 1:
        raise Refusal(f"max_new_tokens={max_new_tokens} must be at least 1")
    if temperature != 0 and not COLDEST <= temperature <= HOTTEST:
        raise Refusal(f"temperature={temperature} must be 0 (greedy) or from {COLDEST} to {HOTTEST:g}")
    if top_k is not None and top_k < 1:
        raise Refusal(f"top_k={top_k} must be at least 1, or null for no cut")
    if top_p is not None and not 0 < top_p <= 1:
        raise Refusal(f"top_p={top_p} must be in (0, 1], or null for no cut")
    longest = max(len(prompt) for prompt in prompts)
    if longest > model.max_seq_len:
        raise Refusal(
            f"a prompt of {longest} tokens exceeds the model's {model.max_seq_len} positions; shorten it to at most "
            f"{model.max_seq_len} tokens"
        )
    if longest + max_new_tokens - 1 > model.max_seq_len:
        raise Refusal(
            f"a prompt of {longest} tokens and max_new_tokens={max_new_tokens} exceed the model's {model.max_seq_len} "
            f"positions; ask for at most {model.max_seq_len - longest + 1} new tokens"
        )
