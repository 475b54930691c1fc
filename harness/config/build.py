"""From a checked configuration to a model: the one place where fields become constructor arguments."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness.config.checks import attention_options
from harness.config.schema import MODEL_DEFAULTS, TrainConfig
from harness.errors import UserError, as_user_error, readable
from modeling.attention import MODEL_OWNED, build_attentions
from modeling.attention.layer_cache import check_values
from modeling.attention.layers import AttentionLayers
from modeling.attention.quantisation import cache_format
from modeling.gpt import GPT
from modeling.shapes import shapes_only

_NOT_SHAPE = ("name", "head_dim", "vocab_size", *MODEL_DEFAULTS)
_COUNTED_ABOVE = 2**30  # bytes


def build_model(config: TrainConfig, vocab_size: int, **changes: Any) -> GPT:
    """The GPT of a configuration, on torch's default device, initialised from torch's global generator.

    vocab_size: the tokenizer's, where the configuration has no larger one of its own. `changes` replace constructor
    arguments (a longer max_seq_len, for instance). Raises UserError for sizes that do not fit together, or
    that this machine's memory cannot hold, before any of it is allocated.
    """
    own = config.model.vocab_size
    if own is not None and own < vocab_size:
        raise UserError(f"model.vocab_size={own} is smaller than the tokenizer's {vocab_size}: leave it out, or raise it")
    arguments = {k: v for k, v in dataclasses.asdict(config.model).items() if k not in _NOT_SHAPE}
    arguments |= {
        "vocab_size": vocab_size if own is None else own,
        "mechanism": config.attention["mechanism"],
        "attention": attention_options(config.attention),
    }
    arguments |= changes
    with as_user_error(f"model={config.model.name} attention={config.attention['name']}: "):
        if _may_be_huge(arguments):
            with shapes_only():
                _check_memory(GPT(**arguments), config)
        return GPT(**arguments)


def model_shapes(config: TrainConfig, vocab_size: int) -> GPT:
    """The same as shapes alone, without memory. Raises UserError as `build_model`, and for a cache.dtype it cannot keep."""
    with shapes_only():
        model = build_model(config, vocab_size)
    with as_user_error(f"attention={config.attention['name']}: "):
        check_values(model.attentions, cache_format(config.cache.dtype))
    return model


def check_weights(config: TrainConfig, vocab_size: int, weights: Path) -> None:
    """Raises UserError, before memory is taken, for a configuration of more parameters than these weights have bytes.

    A run may be somebody else's: its few lines of text cost no more memory than its weights are large.
    """
    with shapes_only():
        claimed = sum(parameter.numel() for parameter in build_model(config, vocab_size).parameters())
    with readable(str(weights), "make it readable"):
        there = weights.stat().st_size
    if claimed > there:
        raise UserError(
            f"the configuration of {config.name} describes {claimed:,} parameters and its weights, {weights}, are {there:,} "
            f"bytes: they are not of one run; restore the two"
        )


def _may_be_huge(arguments: dict[str, Any]) -> bool:
    """Whether it is worth a second or two to count the bytes before they are allocated: a rough bound from above."""
    if torch.get_default_device().type != "cpu" or _free_memory() is None:
        return False
    options = (arguments["attention"], *arguments["attention"].get("kinds", {}).values())
    attention = [value for each in options for value in each.values() if type(value) is int]
    heads = arguments["n_heads"] * max([1, *attention])
    widest = max(arguments["d_model"], heads)
    rows = arguments["n_layers"] * (4 * arguments["mlp_hidden"] + 8 * heads) + 2 * arguments["vocab_size"]
    return (rows + 4 * arguments["n_layers"] * arguments["max_seq_len"]) * widest * 4 > _COUNTED_ABOVE


def _check_memory(model: GPT, config: TrainConfig) -> None:
    tables = [tensor.nbytes for tensor in model.buffers()]
    # A table of positions is computed in float64, in up to four tensors at a time of twice its size.
    needed = sum(parameter.nbytes for parameter in model.parameters()) + sum(tables) + 8 * max(tables, default=0)
    there = _free_memory()
    if there is not None and needed > there:
        raise UserError(
            f"model={config.model.name} attention={config.attention['name']} takes {needed / 1e9:,.0f} GB and this "
            f"machine has {there / 1e9:,.0f} GB of memory left: choose smaller sizes"
        )


def _free_memory() -> int | None:
    """Bytes that are left, or where the system does not say, all that there are; None where it says neither."""
    try:
        with Path("/proc/meminfo").open(encoding="ascii") as file:
            (left,) = (line.split()[1] for line in file if line.startswith("MemAvailable:"))
        return int(left) * 1024
    except (OSError, ValueError):  # another system than Linux
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def build_layer(config: TrainConfig) -> nn.Module:
    """The first attention layer of a configuration, alone."""
    (layer,) = attentions_of(config, 1)
    assert isinstance(layer, nn.Module)
    return layer


def build_layers(config: TrainConfig, first: int) -> AttentionLayers:
    """The attention of a configuration's first layers."""
    return AttentionLayers(attentions_of(config, first))


def layers_that_differ(config: TrainConfig) -> int:
    """How many layers from the first one on hold all kinds that a configuration has: behind them nothing is new."""
    with shapes_only():
        layers = attentions_of(config, config.model.n_layers)
    seen: set[str] = set()
    earlier: set[int] = set()
    needed = 1
    for number, layer in enumerate(layers, start=1):
        described = _described(layer, earlier)
        if described not in seen:
            seen.add(described)
            needed = number
        earlier |= {id(parameter) for parameter in layer.parameters()}
    return needed


def attentions_of(config: TrainConfig, first: int, **changes: Any) -> list[Any]:
    """The attention of the first layers of a model, or of more like them; `changes` replace numbers that the model owns.

    Raises UserError for sizes that do not fit together.
    """
    owned = {name: getattr(config.model, name) for name in MODEL_OWNED} | changes
    n_layers = max(first, config.model.n_layers)
    with as_user_error(f"model={config.model.name} attention={config.attention['name']}: "):
        return build_attentions(
            config.attention["mechanism"], attention_options(config.attention), n_layers, first=first, **owned
        )


def _described(layer: Any, earlier: set[int]) -> str:
    """All that tells a layer from another one: options, shapes, and which parameters are those of an earlier layer."""
    plain = (bool, int, float, str, tuple, list, dict, type(None))
    modules = {
        name: (type(module), {key: value for key, value in vars(module).items() if key[0] != "_" and type(value) in plain})
        for name, module in layer.named_modules()
    }
    parameters = {
        name: (parameter.shape, parameter.requires_grad, id(parameter) in earlier)
        for name, parameter in layer.named_parameters(remove_duplicate=False)
    }
    buffers = {name: buffer.shape for name, buffer in layer.named_buffers()}
    return repr((modules, parameters, buffers, layer.cache_shapes, layer.cache_formula, layer.decode_paths))
