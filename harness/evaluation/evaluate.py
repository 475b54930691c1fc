"""One way to score a model, used by training for its validation and by eval_model.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from harness.evaluation.losses import TokenLosses
from harness.evaluation.perplexity import WHOLE, Integers, Share, SplitResult, TokenSplit, evaluate_split


@dataclass(frozen=True)
class CacheChoice:
    """What modeling/attention/cache.py is asked for."""

    dtype: torch.dtype
    window: int | None = None
    sinks: int = 0


def evaluate_model(
    losses: TokenLosses,
    split: TokenSplit,
    *,
    end_of_text: int,
    decode: Callable[[Sequence[int]], str],
    begins: Sequence[int] = (),
    stride_fraction: float,
    batch_size: int,
    per_document: bool = False,
    max_tokens: int | None = None,
    progress: bool = False,
    through: CacheChoice | None = None,
    segment_tokens: int | None = None,
    poll: Callable[[], None] = lambda: None,
    share: Share = WHOLE,
) -> SplitResult:
    """Perplexity of a split in the own window of the model of `losses`, in evaluation mode; the mode before is put back.

    begins: of a model that has always seen such tokens before a document, the last one stands in for the end of text there.
    through: the kind of cache that every window is decoded through, all of its tokens in one call; the figures are those
    of decoding them one by one. None: without a cache. segment_tokens, share: see evaluate_split. poll is called before
    every batch and may raise.
    """

    model, device = losses.model, losses.device

    def token_losses(inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        poll()
        if begins:
            inputs_BT = inputs_BT.masked_fill(inputs_BT == end_of_text, begins[-1])
        cache = None
        if through is not None:
            cache = model.new_cache(
                *inputs_BT.shape, dtype=through.dtype, device=device, window=through.window, sinks=through.sinks
            )
        return losses(inputs_BT, targets_BT, cache)

    was_training = model.training
    model.eval()
    try:
        return evaluate_split(
            token_losses,
            split,
            end_of_text=end_of_text,
            max_seq_len=model.max_seq_len,
            stride=max(1, round(stride_fraction * model.max_seq_len)),
            batch_size=batch_size,
            device=device,
            decode=decode,
            per_document=per_document,
            max_tokens=max_tokens,
            progress=progress,
            segment_tokens=segment_tokens,
            share=share,
        )
    finally:
        model.train(was_training)


@torch.no_grad()
def target_nats(losses: TokenLosses, inputs_BT: Integers, targets_BT: Integers) -> NDArray[np.float64]:
    """The loss of every target in nats, as `evaluate_model` computes it; the model is in evaluation mode already."""
    tokens_2BT = torch.from_numpy(np.stack((inputs_BT, targets_BT))).to(losses.device)
    nats_BT: NDArray[np.float64] = losses(*tokens_2BT).cpu().double().numpy()
    return nats_BT


def split_metrics(result: SplitResult, prefix: str = "val") -> dict[str, float]:
    """The names under which a split's figures are logged."""
    return {
        f"{prefix}/loss": result.loss,
        f"{prefix}/perplexity": result.perplexity,
        f"{prefix}/bits_per_byte": result.bits_per_byte,
    }
