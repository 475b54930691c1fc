"""Our weights under transformers' names: one mapping, followed in both directions.

Most tensors of theirs are one of ours. Others consist, head by head, of rows of several of ours: those of DeepSeek's MLA, where
coordinates that are rotated as a pair may stand side by side, Phi-3's qkv_proj and gate_up_proj, Qwen3.5's q_proj, in which
the rows of each head's gate stand below those of its queries, and the in_proj_qkv of its layers of gated DeltaNet.

Letters: D d_model, H heads, G key/value heads, K query/key width, N un-rotated and P rotated part of it, V value width,
L kv_lora_rank, R q_lora_rank, M width of the MLP.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.config.schema import TrainConfig
from harness.hf.config_json import Family
from harness.training.checkpoint import unique_tensors
from modeling.attention.gdn import GatedDeltaNet
from modeling.gpt import GPT

LATENT_NORM_EPS = 1e-6  # of the norms on latents in their DeepSeek-V3, whatever its configuration says
_OUTER = {"embedding.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight", "head.weight": "lm_head.weight"}
_INNER = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm", "mlp": "mlp", "attention": "self_attn"}
_STATE = "linear_attn."  # before their names of gated DeltaNet's tensors


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
    """One of our tensors: make(theirs) factor + offset, where theirs has this shape. source None: zeros."""

    source: str | None
    shape: tuple[int, ...]
    make: Callable[[Tensor], Tensor] = lambda tensor: tensor
    factor: float = 1.0
    offset: float = 0.0

    @property
    def computes(self) -> bool:
        """Whether values change, which their dtype might round."""
        return (self.factor, self.offset) != (1.0, 0.0)


def _layouts(attention: Any, config: TrainConfig, family: Family) -> dict[str, Layout]:
    """Their tensors of a layer with this attention that are not simply one of ours, by their name in it; parts by ours."""
    if family.latent:
        return _latent_layouts(config)
    if isinstance(attention, GatedDeltaNet):
        return _state_layouts(attention)
    M = config.model.mlp_hidden
    H, G, K, V = attention.n_heads, attention.n_kv_heads, attention.head_dim, attention.v_head_dim
    layouts = {}
    if family.joined:
        widths = {"q": H * K, "k": G * K, "v": G * V}
        rows = tuple(HeadRows(f"attention.{name}_proj.weight", width) for name, width in widths.items())
        layouts["self_attn.qkv_proj.weight"] = Layout(1, rows)
        rows = tuple(HeadRows(f"mlp.{name}_proj.weight", M) for name in ("gate", "up"))
        layouts["mlp.gate_up_proj.weight"] = Layout(1, rows)
    if family.gated:
        for key in ("weight", "bias"):
            rows = (HeadRows(f"attention.q_proj.{key}", K), HeadRows(f"attention.gate_proj.{key}", V))
            layouts[f"self_attn.q_proj.{key}"] = Layout(H, rows)
    return layouts


def _state_layouts(attention: GatedDeltaNet) -> dict[str, Layout]:
    """Those of gated DeltaNet in Qwen3.5: all that it has, since its names are others."""
    theirs = {
        "in_proj_qkv.weight": ("q_proj.weight", "k_proj.weight", "v_proj.weight"),
        "in_proj_z.weight": ("gate_proj.weight",),
        "in_proj_b.weight": ("beta_proj.weight",),
        "in_proj_a.weight": ("decay_proj.weight",),
        "conv1d.weight": ("conv.weight",),
        "A_log": ("a_log",),
        "dt_bias": ("dt_bias",),
        "norm.weight": ("o_norm.weight",),
        "out_proj.weight": ("o_proj.weight",),
    }
    rows = {name: len(parameter) for name, parameter in attention.named_parameters()}
    return {
        f"{_STATE}{name}": Layout(1, tuple(HeadRows(f"attention.{part}", rows[part]) for part in parts))
        for name, parts in theirs.items()
    }


def _latent_layouts(config: TrainConfig) -> dict[str, Layout]:
    """DeepSeek's.

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
    return {
        f"self_attn.{name}": Layout(
            layout.heads, tuple(dataclasses.replace(part, ours=f"attention.{part.ours}") for part in layout.parts)
        )
        for name, layout in layouts.items()
    }


def _inner(ours: str) -> str:
    """Their name in a layer of one of our tensors."""
    part, key = ours.split(".", 1)
    return f"{_INNER[part]}.{key}"


def _offset(name: str, family: Family) -> float:
    """What ours is above theirs, by either name; nothing of the norm in gated DeltaNet."""
    return family.gain_above if name.endswith("norm.weight") and _STATE not in name else 0.0


def their_weights(model: GPT, config: TrainConfig, family: Family) -> Iterator[tuple[str, Tensor]]:
    """Our parameters under their names, rotated pairs side by side."""
    for name, value in _by_their_names(model, config, family):
        offset = _offset(name, family)
        yield name, value - offset if offset else value


def _by_their_names(model: GPT, config: TrainConfig, family: Family) -> Iterator[tuple[str, Tensor]]:
    outer = {name: value.detach() for name, value in model.named_parameters(remove_duplicate=False) if name in _OUTER}
    for name, value in outer.items():
        yield _OUTER[name], value if name == "norm.weight" else value[: model.vocab_size]
    block: Any
    for number, block in enumerate(model.blocks):
        layouts = _layouts(block.attention, config, family)
        ours = {name: value.detach() for name, value in block.state_dict().items()}
        if family.latent:
            ours = {name: value for name, value in ours.items() if not name.startswith("attention.")}
            ours |= {f"attention.{name}": value for name, value in _plain(block.attention).items()}
        for name, value in _joined(ours, layouts):
            yield f"model.layers.{number}.{name}", value


def _joined(ours: dict[str, Tensor], layouts: Mapping[str, Layout]) -> Iterator[tuple[str, Tensor]]:
    """By their names in a layer. Where the first part of a bias has one, others without have zeros."""
    for name, layout in layouts.items():
        first = ours.get(layout.parts[0].ours)
        if first is None:  # a bias
            continue
        taken: dict[str, int] = {}
        blocks = []
        for part in layout.parts:
            start = taken.get(part.ours, 0)
            taken[part.ours] = start + part.width
            whole = ours[part.ours] if part.ours in ours else first.new_zeros(layout.heads * part.width)
            rows = whole.unflatten(0, (layout.heads, -1))[:, start : start + part.width]
            rows = rows if part.factor == 1.0 else rows / part.factor
            blocks.append(_side_by_side(rows) if part.rotated else rows)
        yield name, torch.cat(blocks, dim=1).flatten(0, 1)
    used = {part.ours for layout in layouts.values() for part in layout.parts}
    yield from ((_inner(name), value) for name, value in ours.items() if name not in used)


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


def tensor_mappings(
    model: GPT, config: TrainConfig, family: Family, *, interleaved: bool
) -> Iterator[tuple[str, TensorMapping]]:
    """For each of our tensors, theirs. interleaved: rotated pairs stand side by side there."""
    parted = [dict(_parted(_layouts(attention, config, family), interleaved)) for attention in model.attentions]
    for name, tensor in unique_tensors(model).items():
        shape, offset = tuple(tensor.shape), _offset(name, family)
        if name in _OUTER:
            rows = shape[0] if name == "norm.weight" else model.vocab_size
            yield name, TensorMapping(_OUTER[name], (rows, *shape[1:]), offset=offset)
            continue
        _, number, key = name.split(".", 2)
        prefix = f"model.layers.{number}."
        if (mapping := parted[int(number)].get(key)) is not None:
            assert mapping.source is not None
            yield name, dataclasses.replace(mapping, source=prefix + mapping.source, shape=(*mapping.shape, *shape[1:]))
        elif key == "attention.q_proj.bias" and family.latent:  # beside biases of latents, theirs has none
            yield name, TensorMapping(None, shape)
        else:
            yield name, TensorMapping(prefix + _inner(key), shape, offset=offset)


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
