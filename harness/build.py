"""From a checked configuration to a model: the one place where fields become constructor arguments."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import torch
from torch import nn

from harness.config import attention_options
from harness.errors import UserError
from harness.schema import TrainConfig
from modeling.attention import MODEL_OWNED, build_attentions
from modeling.gpt import GPT

_NOT_SHAPE = ("name", "head_dim", "default_tokens", "default_batch_size", "default_lr", "vocab_size")
_COUNTED_ABOVE = 2**33  # bytes


def build_model(config: TrainConfig, vocab_size: int, **changes: Any) -> GPT:
    """The GPT of a configuration, on torch's default device, initialised from torch's global generator.

    vocab_size: the tokenizer's, where the configuration has no larger one of its own. `changes` replace constructor
    arguments (a longer max_seq_len, for instance). Raises UserError for sizes that do not fit together, or
    that this machine's memory cannot hold, before any of it is allocated.
    """
    own = config.model.vocab_size
    if own is not None and own < vocab_size:
        raise UserError(
            f"model.vocab_size={own} is smaller than the tokenizer's {vocab_size}: leave it out, or raise it"
        )
    arguments = {k: v for k, v in dataclasses.asdict(config.model).items() if k not in _NOT_SHAPE}
    arguments |= {"vocab_size": vocab_size if own is None else own, "mechanism": config.attention["mechanism"],
                  "attention": attention_options(config.attention)}  # fmt: skip
    arguments |= changes
    try:
        if _may_be_huge(arguments):
            with torch.device("meta"):
                _check_memory(GPT(**arguments), config)
        return GPT(**arguments)
    except ValueError as error:
        raise UserError(f"model={config.model.name} attention={config.attention['name']}: {error}") from None


def _may_be_huge(arguments: dict[str, Any]) -> bool:
    """Whether it is worth a second or two to count the bytes before they are allocated: a rough bound from above."""
    if torch.get_default_device().type != "cpu" or _physical_memory() is None:
        return False
    attention = [value for value in arguments["attention"].values() if type(value) is int]
    heads = arguments["n_heads"] * max([1, *attention])
    widest = max(arguments["d_model"], heads)
    rows = arguments["n_layers"] * (4 * arguments["mlp_hidden"] + 8 * heads) + 2 * arguments["vocab_size"]
    return (rows + 4 * arguments["n_layers"] * arguments["max_seq_len"]) * widest * 4 > _COUNTED_ABOVE


def _check_memory(model: GPT, config: TrainConfig) -> None:
    needed = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    there = _physical_memory()
    if there is not None and needed > there:
        raise UserError(
            f"model={config.model.name} attention={config.attention['name']} takes {needed / 1e9:,.0f} GB and this "
            f"machine has {there / 1e9:,.0f} GB of memory: choose smaller sizes"
        )


def _physical_memory() -> int | None:
    """Bytes; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def build_layer(config: TrainConfig) -> nn.Module:
    """One attention layer of a configuration, alone."""
    owned = {name: getattr(config.model, name) for name in MODEL_OWNED}
    (layer,) = build_attentions(config.attention["mechanism"], attention_options(config.attention), 1, **owned)
    assert isinstance(layer, nn.Module)
    return layer
