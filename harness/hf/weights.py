"""Our weights under transformers' names: one mapping, followed in both directions.

Outside attention, and in GQA, a tensor of theirs is one of ours. A tensor of DeepSeek's MLA consists, head by head, of rows of
several of ours, where coordinates that are rotated as a pair may stand side by side.

Letters: D d_model, H heads, N un-rotated and P rotated part of queries and keys, V value width, L kv_lora_rank,
R q_lora_rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.config.schema import TrainConfig
from harness.training.checkpoint import unique_tensors
from modeling.gpt import GPT

LATENT_NORM_EPS = 1e-6  # of the norms on latents in their DeepSeek-V3, whatever its configuration says
_OUTER = {"embedding.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight", "head.weight": "lm_head.weight"}
_INNER = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm", "mlp": "mlp", "attention": "self_attn"}


@dataclass(frozen=True)
class HeadRows:
    """The next `width` rows, in each head, of one of our tensors. factor: ours are theirs times that."""

    ours: str
    width: int
    rotated: bool = False
    factor: float = 1.0


@dataclass(frozen=True)
class Layout:
    """What a tensor of theirs consists of."""

    heads: int
    parts: tuple[HeadRows, ...]

    @property
    def rows(self) -> int:
        return self.heads * sum(part.width for part in self.parts)


@dataclass(frozen=True)
class TensorMapping:
    """How one of our tensors is made of one of theirs, which has this shape. source None: zeros."""

    source: str | None
    shape: tuple[int, ...]
    make: Callable[[Tensor], Tensor] = lambda tensor: tensor
    factor: float = 1.0


def latent_layouts(config: TrainConfig) -> dict[str, Layout]:
    """DeepSeek's tensors of one layer that are not simply one of ours.

    Their norms of latents have an eps of their own. A latent times a is normed with eps as the latent itself with
    eps / a^2: the factor makes their eps of ours.
    """
    options, H = config.attention, config.model.n_heads
    N, P, V = options["qk_nope_head_dim"], options["qk_rope_head_dim"], options["v_head_dim"]
    L, R = options["kv_lora_rank"], options["q_lora_rank"]
    factor = (config.model.norm_eps / LATENT_NORM_EPS) ** 0.5
    query, theirs = ("q_proj.weight", "q_proj.weight") if R is None else ("q_up_proj.weight", "q_b_proj.weight")
    layouts = {
        theirs: Layout(H, (HeadRows(query, N), HeadRows(query, P, rotated=True))),
        "kv_b_proj.weight": Layout(H, (HeadRows("k_up_proj.weight", N), HeadRows("v_up_proj.weight", V))),
        "kv_a_layernorm.weight": Layout(1, (HeadRows("latent_norms.0.weight", L),)),
    }
    if R is not None:
        layouts["q_a_layernorm.weight"] = Layout(1, (HeadRows("q_latent_norm.weight", R),))
    for key in ("weight", "bias"):
        latent, rotated = HeadRows(f"kv_down_proj.{key}", L, factor=factor), HeadRows(f"k_rope_proj.{key}", P, rotated=True)
        layouts[f"kv_a_proj_with_mqa.{key}"] = Layout(1, (latent, rotated))
        if R is not None:
            layouts[f"q_a_proj.{key}"] = Layout(1, (HeadRows(f"q_down_proj.{key}", R, factor=factor),))
    return layouts


def their_weights(model: GPT, config: TrainConfig) -> Iterator[tuple[str, Tensor]]:
    """Our parameters under their names, rotated pairs side by side."""
    outer = {name: value.detach() for name, value in model.named_parameters(remove_duplicate=False) if name in _OUTER}
    for name, value in outer.items():
        yield _OUTER[name], value if name == "norm.weight" else value[: model.vocab_size]
    is_latent = config.attention["mechanism"] == "mla"
    layouts = latent_layouts(config) if is_latent else {}
    block: Any
    for number, block in enumerate(model.blocks):
        for part, theirs in _INNER.items():
            weights = getattr(block, part).state_dict()
            if part == "attention" and is_latent:
                weights = dict(_joined(_plain(block.attention), layouts))
            for key, value in weights.items():
                yield f"model.layers.{number}.{theirs}.{key}", value.detach()


def _joined(ours: dict[str, Tensor], layouts: Mapping[str, Layout]) -> Iterator[tuple[str, Tensor]]:
    for name, layout in layouts.items():
        if layout.parts[0].ours not in ours:  # a bias
            continue
        taken: dict[str, int] = {}
        blocks = []
        for part in layout.parts:
            start = taken.get(part.ours, 0)
            taken[part.ours] = start + part.width
            rows = ours[part.ours].unflatten(0, (layout.heads, -1))[:, start : start + part.width]
            rows = rows if part.factor == 1.0 else rows / part.factor
            blocks.append(_side_by_side(rows) if part.rotated else rows)
        yield name, torch.cat(blocks, dim=1).flatten(0, 1)
    used = {part.ours for layout in layouts.values() for part in layout.parts}
    yield from ((name, value) for name, value in ours.items() if name not in used)


def _plain(attention: Any) -> dict[str, Tensor]:
    """MLA's parameters, by our names, where what other weights express is expressed by them.

    Scales of latents go into the norms' gains, a latent that is a slice of x is a projection by rows of the identity,
    up-projections that several heads share stand there once for each. A latent that has no bias beside a rotated key with
    one has zeros.
    """
    H, groups = attention.n_heads, attention.n_kv_heads
    state = attention.state_dict().items()
    ours = {name: value.detach() for name, value in state if not name.startswith(("in_proj.", "rope."))}
    if attention.in_proj is not None:
        down = ("q_proj" if attention.q_lora_rank is None else "q_down_proj", "kv_down_proj", "k_rope_proj")
        for key, value in attention.in_proj.state_dict().items():
            parts = value.split(attention.down_widths)
            ours |= {f"{name}.{key}": part for name, part in zip(down, parts, strict=True)}
    elif attention.kv_down_proj is None:
        like = ours["k_rope_proj.weight"]
        ours["kv_down_proj.weight"] = torch.eye(attention.kv_lora_rank, attention.d_model, dtype=like.dtype, device=like.device)
    if "k_rope_proj.bias" in ours and "kv_down_proj.bias" not in ours:
        ours["kv_down_proj.bias"] = torch.zeros_like(ours["kv_down_proj.weight"][:, 0])
    ours["latent_norms.0.weight"] = ours["latent_norms.0.weight"] * attention.kv_scale
    if attention.q_lora_rank is not None:
        ours["q_latent_norm.weight"] = ours["q_latent_norm.weight"] * attention.q_scale
    for name in ("k_up_proj.weight", "v_up_proj.weight"):
        ours[name] = ours[name].unflatten(0, (groups, -1)).repeat_interleave(H // groups, dim=0).flatten(0, 1)
    return ours


def _side_by_side(rows: Tensor) -> Tensor:
    """Rows of each head that are rotated in pairs (i, i + P/2), reordered for pairs (2i, 2i + 1)."""
    return rows.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


def tensor_mappings(model: GPT, config: TrainConfig, *, interleaved: bool) -> Iterator[tuple[str, TensorMapping]]:
    """For each of our tensors, theirs. interleaved: rotated pairs stand side by side there."""
    latent = dict(_parted(latent_layouts(config), interleaved)) if config.attention["mechanism"] == "mla" else {}
    for name, tensor in unique_tensors(model).items():
        shape = tuple(tensor.shape)
        if name in _OUTER:
            yield name, TensorMapping(_OUTER[name], shape if name == "norm.weight" else (model.vocab_size, *shape[1:]))
            continue
        _, number, part, key = name.split(".", 3)
        prefix = f"model.layers.{number}.{_INNER[part]}."
        if part == "attention" and key in latent:
            mapping = latent[key]
            assert mapping.source is not None
            yield name, dataclasses.replace(mapping, source=prefix + mapping.source, shape=(*mapping.shape, *shape[1:]))
        elif part == "attention" and key == "q_proj.bias" and latent:  # beside biases of latents, theirs has none
            yield name, TensorMapping(None, shape)
        else:
            yield name, TensorMapping(prefix + key, shape)


def _parted(layouts: Mapping[str, Layout], interleaved: bool) -> Iterator[tuple[str, TensorMapping]]:
    """Recipes by our name in a layer; of a shape the rows alone."""
    for name, layout in layouts.items():
        for ours in dict.fromkeys(part.ours for part in layout.parts):
            factor = next(part.factor for part in layout.parts if part.ours == ours)
            yield ours, TensorMapping(name, (layout.rows,), _taker(layout, ours, interleaved), factor)


def _taker(layout: Layout, ours: str, interleaved: bool) -> Callable[[Tensor], Tensor]:
    def take(theirs: Tensor) -> Tensor:
        heads = theirs.unflatten(0, (layout.heads, -1)).split([part.width for part in layout.parts], dim=1)
        blocks = [
            _in_halves(rows) if part.rotated and interleaved else rows
            for part, rows in zip(layout.parts, heads, strict=True)
            if part.ours == ours
        ]
        return torch.cat(blocks, dim=1).flatten(0, 1)

    return take


def _in_halves(rows: Tensor) -> Tensor:
    """Rows of each head that are rotated in pairs (2i, 2i + 1), reordered for pairs (i, i + P/2)."""
    return rows.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)
