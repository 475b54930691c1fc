"""From a checked configuration to a model: the one place where fields become constructor arguments."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from harness.config import attention_options
from harness.errors import UserError
from harness.schema import TrainConfig
from modeling.attention import MODEL_OWNED, build_attentions
from modeling.gpt import GPT

_NOT_SHAPE = ("name", "head_dim", "default_tokens", "default_batch_size", "default_lr", "vocab_size")


def build_model(config: TrainConfig, vocab_size: int, **changes: Any) -> GPT:
    """The GPT of a configuration, on torch's default device, initialised from torch's global generator.

    vocab_size: the tokenizer's, where the configuration has no larger one of its own. `changes` replace constructor
    arguments (a longer max_seq_len, for instance). Raises UserError for sizes that do not fit together.
    """
    own = config.model.vocab_size
    if own is not None and own < vocab_size:
        raise UserError(
            f"model.vocab_size={own} is smaller than the tokenizer's {vocab_size}: leave it out, or raise it"
        )
    arguments = {k: v for k, v in dataclasses.asdict(config.model).items() if k not in _NOT_SHAPE}
    arguments |= {"vocab_size": vocab_size if own is None else own, "mechanism": config.attention["mechanism"],
                  "attention": attention_options(config.attention)}  # fmt: skip
    try:
        return GPT(**(arguments | changes))
    except ValueError as error:
        raise UserError(f"model={config.model.name} attention={config.attention['name']}: {error}") from None


def build_layer(config: TrainConfig) -> nn.Module:
    """One attention layer of a configuration, alone."""
    owned = {name: getattr(config.model, name) for name in MODEL_OWNED}
    (layer,) = build_attentions(config.attention["mechanism"], attention_options(config.attention), 1, **owned)
    assert isinstance(layer, nn.Module)
    return layer
