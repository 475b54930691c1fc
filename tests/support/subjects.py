"""What an extra looks at (harness/evaluation/probes), around any model and any tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.evaluation.losses import TokenLosses
from harness.evaluation.probes import Subject
from tests.evaluation.test_perplexity import Split


class LossTable:
    """A model of which nothing is known but its losses: a function of inputs and targets."""

    position_embedding = None

    def __init__(self, losses: Callable[[Tensor, Tensor], Tensor], max_seq_len: int) -> None:
        self.losses, self.max_seq_len = losses, max_seq_len

    def token_losses(self, inputs_BT: Tensor, targets_BT: Tensor, cache: None = None) -> Tensor:
        return self.losses(inputs_BT, targets_BT)


def documents(*texts: Sequence[int], end_of_text: int) -> Split:
    """Documents of these tokens, an end-of-text token after each; a token is a byte and a word."""
    tokens = [token for text in texts for token in (*text, end_of_text)]
    sizes = np.array([len(text) for text in texts])
    return Split(np.array(tokens, dtype=np.uint16), np.cumsum([0, *(sizes + 1)]), sizes, sizes)


def on_cpu(model: Any) -> TokenLosses:
    """A model's losses in float32."""
    return TokenLosses(model, precision=torch.float32, device=torch.device("cpu"))


def subject_of(model: Any, split: Split, *, end_of_text: int, **changes: Any) -> Subject:
    """`longer` gives a LossTable of the same losses; give another one for a GPT."""
    arguments: dict[str, Any] = {
        "longer": lambda length: LossTable(model.losses, length),
        "encode": lambda text: list(text.encode()),
        "decode": lambda ids: "x " * len(ids),
        "dataset": "made",
        "batch_size": 3,
        "max_tokens": 100_000,
    }
    return Subject(losses=on_cpu(model), split=split, end_of_text=end_of_text, **(arguments | changes))
