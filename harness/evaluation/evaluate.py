"""One way to score a model, used by training for its validation and by eval_model.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from harness.data import Tokenizer, VerifiedSplit
from harness.errors import UserError
from harness.evaluation.losses import TokenLosses
from harness.evaluation.metric import SCORES
from harness.evaluation.perplexity import WHOLE, Integers, Scoring, Share, SplitResult, evaluate_split
from modeling.attention.cache import Cache
from modeling.attention.quantisation import CacheFormat
from modeling.gpt import GPT


@dataclass(frozen=True)
class CacheChoice:
    """What modeling/attention/cache.py is asked for."""

    dtype: torch.dtype | CacheFormat
    window: int | None = None
    sinks: int = 0

    def cache(self, model: GPT, rows: int, tokens: int) -> list[Cache]:
        """An empty one."""
        device = model.embedding.weight.device
        return model.new_cache(rows, tokens, dtype=self.dtype, device=device, window=self.window, sinks=self.sinks)

    def check_window(self, context: int) -> None:
        """Raises UserError for a window that hides nothing of texts of so many tokens: scores would be those of all tokens."""
        if self.window is not None and self.window > context:
            raise UserError(
                f"cache.window={self.window} is longer than the context, model.max_seq_len={context}: choose a shorter one, or "
                f"null to see everything"
            )


def evaluate_model(
    losses: TokenLosses,
    split: VerifiedSplit,
    texts: Tokenizer,
    scoring: Scoring,
    *,
    through: CacheChoice | None = None,
    poll: Callable[[], None] = lambda: None,
    share: Share = WHOLE,
) -> SplitResult:
    """Perplexity of a split in the own window of the model of `losses`, in evaluation mode; the mode before is put back.

    Of a model that has always seen tokens before a document (texts.begins), the last one stands in for the end of text there.
    through: the kind of cache that every window is decoded through, all of its tokens in one call, with the figures of
    decoding them one by one. Beside them stand the figures without the cache, and the mean KL(without || through) of the
    next token's distributions, in nats. None: without a cache. share: see evaluate_split. poll is called
    before every batch and may raise.
    """
    model, device = losses.model, losses.device

    def token_losses(inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        poll()
        if texts.begins:
            inputs_BT = inputs_BT.masked_fill(inputs_BT == texts.end_of_text, texts.begins[-1])
        if through is None:
            return losses(inputs_BT, targets_BT)
        return losses.beside(inputs_BT, targets_BT, through.cache(model, *inputs_BT.shape))

    was_training = model.training
    model.eval()
    try:
        return evaluate_split(token_losses, split, texts, scoring, max_seq_len=model.max_seq_len, device=device, share=share)
    finally:
        model.train(was_training)


@torch.no_grad()
def target_nats(
    losses: TokenLosses, inputs_BT: Integers, targets_BT: Integers, through: CacheChoice | None = None
) -> NDArray[np.float64]:
    """The loss of every target in nats, as `evaluate_model` computes it; the model is in evaluation mode already."""
    inputs, targets = torch.from_numpy(np.stack((inputs_BT, targets_BT))).to(losses.device)
    cache = None if through is None else through.cache(losses.model, *inputs_BT.shape)
    nats_BT: NDArray[np.float64] = losses(inputs, targets, cache).cpu().double().numpy()
    return nats_BT


def split_metrics(result: SplitResult) -> dict[str, float]:
    """The names under which a validation's figures are logged."""
    return {f"val/{key}": value for key, score in SCORES.items() if (value := score.of(result.scores())) is not None}
