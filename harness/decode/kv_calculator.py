"""The size of a key/value cache by arithmetic, and what else follows from the shape of an MLA layer.

Cached elements per token and layer (DeepSeek-V2, arXiv 2405.04434, section 2.1.3 and table 1), with H query heads,
G key/value heads, d their width, and MLA's n = qk_nope_head_dim, r = qk_rope_head_dim, v = v_head_dim:

    GQA (MHA: G = H, MQA: G = 1)    2 G d
    MLA                             kv_lora_rank + r
    MLA cached expanded             H (n + r + v)
    MHA of MLA's shape              H (n + v)

harness/hf/cache.py describes the cache of a Hugging Face model, measured or by these formulas, and
`describe_model` that of one built here.
"""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from harness.errors import UserError
from harness.files.text import aligned

if TYPE_CHECKING:
    import torch

    from modeling.attention.quantisation import CacheFormat
    from modeling.gpt import GPT


@dataclass(frozen=True)
class Format:
    """How an element is stored: so many bytes for each block of so many elements, scales included where it fixes them."""

    size: int
    block: int = 1
    scales: str = ""  # what is said of them

    @property
    def width(self) -> float:
        """Bytes of one element; a whole number where it is one."""
        return self.size // self.block if self.size % self.block == 0 else self.size / self.block

    def of(self, elements: int) -> int:
        """Bytes of so many elements."""
        return -(-elements * self.size // self.block)


_BARE = "the elements alone; scales, and parts kept in 16 bits, come on top"
_GGML = "llama.cpp's blocks of 32 elements, their scales counted"
_MLX = "mlx-lm's groups of 64 elements, a scale and a bias of 16 bits for each counted"
# fp8, int8, int4, int2 say nothing of their scales; the other small ones do.
FORMATS: dict[str, Format] = {
    "float32": Format(4),
    "bfloat16": Format(2),
    "float16": Format(2),
    "fp8": Format(1, 1, _BARE),
    "int8": Format(1, 1, _BARE),
    "fp4": Format(1, 2, _BARE),
    "int4": Format(1, 2, _BARE),
    "int2": Format(1, 4, _BARE),
    "mxfp8": Format(33, 32, "a scale of 8 bits for each 32 elements counted"),
    "mxfp4": Format(17, 32, "a scale of 8 bits for each 32 elements counted"),
    "nvfp4": Format(9, 16, "a scale of 8 bits for each 16 elements counted"),
    "q8_0": Format(34, 32, _GGML),
    "q5_1": Format(24, 32, _GGML),
    "q5_0": Format(22, 32, _GGML),
    "q4_1": Format(20, 32, _GGML),
    "q4_0": Format(18, 32, _GGML),
    "iq4_nl": Format(18, 32, _GGML),
    **{f"{bits}bit": Format(8 * bits + 4, 64, _MLX) for bits in (2, 3, 4, 5, 6, 8)},
}
_ALSO = {
    also: name
    for name, others in {
        "float32": "fp32 float f32",
        "bfloat16": "bf16",
        "float16": "fp16 f16 half",
        "fp8": "fp8_e4m3 fp8_e5m2 float8 float8_e4m3 float8_e4m3fn float8_e5m2 e4m3",
        "int8": "uint8",
        "int4": "uint4",
        "fp4": "float4",
    }.items()
    for also in others.split()
}


def format_named(text: str) -> tuple[str, Format]:
    """(its name here, the format): upper case, torch.bfloat16 and 6-bit are understood. Raises UserError."""
    name = text.lower().removeprefix("torch.").replace("-bit", "bit").replace("-", "_")
    name = _ALSO.get(name, name)
    if name not in FORMATS:
        near = difflib.get_close_matches(name, [*FORMATS, *_ALSO], n=1)
        raise UserError(
            f"dtype={text} is unknown; " + (f"did you mean {near[0]}?" if near else f"known are {', '.join(FORMATS)}")
        )
    return name, FORMATS[name]


@dataclass(frozen=True)
class LatentShape:
    """The sizes of one MLA layer and what follows from them. Parameters: no biases, with the latents' RMSNorm gains."""

    d_model: int
    n_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int

    @property
    def elements_expanded(self) -> int:
        """Elements of a token's keys and values of all heads, the rotated key repeated for each."""
        return self.n_heads * (self.qk_nope_head_dim + self.qk_rope_head_dim + self.v_head_dim)

    @property
    def elements_mha(self) -> int:
        """Elements of MHA with heads of qk_nope_head_dim and v_head_dim."""
        return self.n_heads * (self.qk_nope_head_dim + self.v_head_dim)

    @property
    def parameters(self) -> int:
        """Thin factors, as they are trained and as absorbed decoding should keep them."""
        head = self.qk_nope_head_dim + self.qk_rope_head_dim
        up = self.kv_lora_rank * self.elements_mha
        return self._down + self._queries(head) + up + self.n_heads * self.v_head_dim * self.d_model

    @property
    def parameters_premerged(self) -> int:
        """W_UK multiplied into the queries' projection and W_UV into the output's, once and for all."""
        return (
            self._down
            + self._queries(self.kv_lora_rank + self.qk_rope_head_dim)
            + self.n_heads * self.kv_lora_rank * self.d_model
        )

    @property
    def parameters_mha(self) -> int:
        """MHA with heads of qk_nope_head_dim and v_head_dim."""
        return 2 * self.d_model * self.elements_mha

    @property
    def macs_per_cached_token(self) -> dict[str, int]:
        """Multiply-adds of one new token for each cached one: MHA of the same shape, and the two ways to read a latent."""
        up = self.kv_lora_rank * self.elements_mha
        return {
            "mha": self.elements_mha,
            "absorbed": self.n_heads * (2 * self.kv_lora_rank + self.qk_rope_head_dim),
            "expand": up + self.elements_expanded,
            "expand_up_projection": up,
        }

    @property
    def _down(self) -> int:
        """Down-projections of x and the gains of the norms behind them."""
        rank = self.q_lora_rank or 0
        return self.d_model * (self.kv_lora_rank + self.qk_rope_head_dim + rank) + self.kv_lora_rank + rank

    def _queries(self, head: int) -> int:
        return (self.q_lora_rank or self.d_model) * self.n_heads * head


@dataclass(frozen=True)
class LayerCache:
    """What one layer keeps: of each token, whatever the context, and what is in no proportion to it."""

    parts: Mapping[str, int]  # elements of a token by what they are; empty: nothing that grows with the context
    naive: int | None  # elements if MLA were cached expanded; those of `parts` otherwise; None: unknown
    mha: int | None  # elements of MHA of the same shape; None: it says nothing
    window: int | None = None  # tokens kept at most; None: all
    kind: str = "full attention"
    heads: int = 1  # groups of keys and values, which devices share; 1: each device keeps all
    states: Mapping[str, int] = field(default_factory=dict)  # bytes of a sequence that do not grow
    state_heads: int = 1  # parts into which devices may divide the states
    at_context: int = 0  # elements of a sequence, at the context described, of what is compressed
    mha_newest: int = 0  # bytes of a sequence that MHA would take as this takes NEWEST

    @property
    def elements(self) -> int:
        return sum(self.parts.values())

    @property
    def state_bytes(self) -> int:
        return sum(self.states.values())

    @property
    def newest_bytes(self) -> int:
        """Of the states, what is the format's and no property of the variant: tokens not yet stored as they stay."""
        return self.states.get(NEWEST, 0)

    @property
    def is_empty(self) -> bool:
        return not (self.parts or self.states or self.at_context)

    def held(self, context: int) -> int:
        """Tokens of which `parts` are kept."""
        return min(context, self.window or context)

    def on_each_of(self, devices: int) -> LayerCache:
        """What one of so many tensor-parallel devices keeps. Raises UserError where heads do not divide among them.

        Heads are divided; fewer heads than devices are repeated. One head, a latent and an indexer's keys are on all.
        """
        if devices == 1:
            return self
        if self.heads % devices and devices % self.heads:
            raise UserError(f"tp={devices} devices cannot share {self.heads} key/value heads: choose a divisor or a multiple")
        if self.state_heads % devices and self.states:
            raise UserError(f"tp={devices} devices cannot share a state of {self.state_heads} parts: choose a divisor")
        share = Fraction(max(1, self.heads // devices), self.heads)
        parts = {name: int(size * share) if name in SHARED_OUT else size for name, size in self.parts.items()}
        divided = [None if size is None or size % devices else size // devices for size in (self.naive, self.mha)]
        naive = divided[0] if self.naive != self.elements else sum(parts.values())
        states = {name: size // devices for name, size in self.states.items()}
        mha_newest = self.mha_newest // devices
        return replace(self, parts=parts, naive=naive, mha=divided[1], states=states, mha_newest=mha_newest)


NEWEST = "newest keys"
SHARED_OUT = ("keys", "values", "cached")  # parts that belong to a head


@dataclass(frozen=True)
class CacheDescription:
    """The cache of a whole model. `latent` is given where all layers are plain MLA of one shape."""

    name: str
    model_type: str
    layers: tuple[LayerCache, ...]
    latent: LatentShape | None = None
    notes: tuple[str, ...] = ()
    made_for: int | None = None  # tokens of the longest sequence that the model is said to take
    states_kept: str = "transformers keeps them in a bfloat16 model, whatever dtype says"


# What is cached -> what a layer would take, in elements of a token and bytes of the newest ones: as it is, MLA expanded, MHA
# of the same shape.
_WAYS: dict[str, Callable[[LayerCache], tuple[int | None, int]]] = {
    "": lambda layer: (layer.elements, 0),  # those stand among its states
    "naive_": lambda layer: (layer.naive, layer.newest_bytes),
    "mha_": lambda layer: (layer.mha, layer.mha_newest),
}


def describe_model(
    model: GPT,
    *,
    name: str,
    variant: str,
    dtype: torch.dtype | CacheFormat,
    context: int,
    mha_elements: int,
    latent: LatentShape | None,
) -> CacheDescription:
    """The cache of one of our models by its layers' formulas, states and the newest of tokens in groups in a cache of `dtype`.

    context: tokens of a sequence, by which tokens that are stored in groups are in whole ones or wait. mha_elements: of MHA
    with the same heads, a layer; a layer that attends to no tokens is compared with nothing.
    """
    from modeling.attention import attends
    from modeling.attention.layer_cache import formula_bytes, formula_bytes_at, keys_seen, state_bytes_of
    from modeling.attention.quantisation import GROUP, as_format, newest_bytes

    key_storage = as_format(dtype).storage("k", sixteen_bits=(), values=("v",))
    mha_newest = newest_bytes(key_storage, (mha_elements // 2,), GROUP)
    layers = []
    grown = 0  # bytes that are in proportion to the tokens, times GROUP
    for attention in model.attentions:
        state = state_bytes_of(attention, dtype)
        before = -(-grown // GROUP)  # as `cache_figures` rounds the sum of all layers up
        grown += round(formula_bytes(attention, dtype) * GROUP) * keys_seen(attention, context)
        in_proportion = -(-grown // GROUP) - before
        fixed = {"state": state, NEWEST: formula_bytes_at(attention, dtype, context) - state - in_proportion}
        states = {name: size for name, size in fixed.items() if size}
        if not attends(attention):
            layers.append(LayerCache({}, 0, None, kind="state", states=states, state_heads=attention.n_kv_heads))
            continue
        formula = expanded = attention.cache_formula
        heads, is_latent = attention.n_kv_heads, getattr(attention, "kv_lora_rank", None) is not None
        if is_latent:
            expanded = heads * (attention.qk_width + attention.v_head_dim) if formula else formula
            heads = attention.latent_groups
        window = getattr(attention, "window", None)
        usual = "full attention" if window is None else "sliding window"
        kind = ("latent" if is_latent and expanded != formula else usual) if formula else "no cache of its own"
        shared = math.prod(attention.cache_shapes.get("k_rope", (0,))) if heads > 1 else 0  # with one, all is on each device
        parts = {"cached": formula - shared, "one rotated key": shared}
        parts = {name: size for name, size in parts.items() if size}
        layers.append(
            LayerCache(
                parts,
                expanded,
                mha_elements,
                window=window,
                kind=kind,
                heads=heads,
                states=states,
                state_heads=heads,
                mha_newest=mha_newest,
            )
        )
    kept = "our caches of that dtype keep them: float32 where tokens are summed, never 8 bits or fewer"
    return CacheDescription(name, variant, tuple(layers), latent, states_kept=kept)


def cache_figures(
    description: CacheDescription,
    *,
    dtype: str,
    context: int,
    batch: int,
    memory_gb: float | None,
    tp: int = 1,
    stored: Format | None = None,
) -> dict[str, Any]:
    """All figures as one JSON object. Lists stand where layers differ, in the order of the layers.

    tp: tensor-parallel devices; every figure is then that of one of them. stored: what a dtype means that no other program
    has. Raises UserError where they cannot share.
    """
    if stored is None:
        dtype, stored = format_named(dtype)
    layers, latent = [layer.on_each_of(tp) for layer in description.layers], description.latent
    description = replace(description, layers=tuple(layers))
    if all(layer.is_empty for layer in layers):
        raise UserError(f"{description.name} has no layer that caches anything: there is nothing to count")
    figures: dict[str, Any] = {
        "name": description.name,
        "model_type": description.model_type,
        "layers": len(layers),
        "dtype": dtype,
        "bytes_per_element": stored.width,
        "scales": stored.scales,
        "context": context,
        "batch": batch,
        "tp": tp,
        "window": _one_or_all([layer.window for layer in layers]),
        "cached": _one_or_all([dict(layer.parts) for layer in layers]),
    }
    for prefix, taken_by in _WAYS.items():
        known, newest = zip(*map(taken_by, layers), strict=True)
        figures |= _of_one_way(prefix, known, layers, stored, context, batch, newest=sum(newest))
    kinds = [
        _kind(kind, [layer for layer in layers if layer.kind == kind], stored, context, batch)
        for kind in dict.fromkeys(layer.kind for layer in layers)
    ]
    ratio = _mha_ratio(figures, layers, batch)  # while total_bytes are those in proportion to the tokens
    states = sum(layer.state_bytes for layer in layers) * batch
    figures |= {
        "kinds": kinds,
        "state_bytes": states,
        "kv_bytes": figures["total_bytes"] + stored.of(sum(layer.at_context for layer in layers)) * batch,
    }
    figures["total_bytes"] = figures["kv_bytes"] + states
    sequence = figures["total_bytes"] // batch
    return figures | {
        "mha_ratio": ratio,
        "memory_gb": memory_gb,
        "largest_batch": None if memory_gb is None else int(memory_gb * 1e9 // sequence),
        "parameters_per_layer": latent and latent.parameters,
        "parameters_per_layer_premerged": latent and latent.parameters_premerged,
        "parameters_per_layer_mha": latent and latent.parameters_mha,
        "macs_per_cached_token": latent and latent.macs_per_cached_token,
        "notes": [*description.notes, *_notes(description, stored, context, batch, tp)],
    }


def _mha_ratio(figures: Mapping[str, Any], layers: Sequence[LayerCache], batch: int) -> float | None:
    """How many times as much MHA of the same shape takes, of what is in proportion to the tokens and of the newest ones."""
    if not figures["elements_per_token"] or "mha_total_bytes" not in figures:
        return None
    own = figures["total_bytes"] + sum(layer.newest_bytes for layer in layers) * batch
    return float(figures["mha_total_bytes"] / own)


def _of_one_way(
    prefix: str,
    known: Sequence[int | None],
    layers: Sequence[LayerCache],
    stored: Format,
    context: int,
    batch: int,
    newest: int,
) -> dict[str, Any]:
    """Elements and bytes of layers that take so many elements of a token each; nothing where that is not known of all.

    newest: bytes of a sequence beside them.
    """
    by_layer = [elements for elements in known if elements is not None]
    if len(by_layer) < len(known) or (prefix and not sum(by_layer)):
        return {}
    held = sum(elements * layer.held(context) for elements, layer in zip(by_layer, layers, strict=True))
    figures = {
        "elements_per_token_per_layer": _one_or_all(by_layer),
        "bytes_per_token_per_layer": _one_or_all([stored.of(elements) for elements in by_layer]),
        "elements_per_token": sum(by_layer),
        "bytes_per_token": stored.of(sum(by_layer)),
        "total_bytes": (stored.of(held) + newest) * batch,
    }
    return {f"{prefix}{name}": figure for name, figure in figures.items()}


def _kind(kind: str, layers: Sequence[LayerCache], stored: Format, context: int, batch: int) -> dict[str, Any]:
    """What the layers of one kind take together."""
    elements = sum(layer.elements * layer.held(context) + layer.at_context for layer in layers)
    states = sum(layer.state_bytes for layer in layers)
    return {
        "kind": kind,
        "layers": len(layers),
        "tokens": _one_or_all([layer.held(context) if layer.parts else 0 for layer in layers]),
        "bytes": (stored.of(elements) + states) * batch,
    }


def _notes(description: CacheDescription, stored: Format, context: int, batch: int, tp: int) -> list[str]:
    """What follows from the context, the format and the devices."""
    layers, notes = description.layers, []
    if description.made_for is not None and context > description.made_for:
        notes.append(f"context={context:,} passes the {description.made_for:,} tokens that the model was made for")
    if any(layer.held(context) < context for layer in layers):
        full = stored.of(sum(layer.elements * context + layer.at_context for layer in layers)) * batch
        full += sum(layer.state_bytes for layer in layers) * batch
        notes.append(f"an engine that reserves pages for all tokens in layers with a window too takes {_in_bytes(full)}")
    if any(layer.states for layer in layers):
        notes.append(f"states do not grow with the context and are counted in the width in which {description.states_kept}")
    if any(layer.at_context for layer in layers):
        notes.append("what is compressed is measured at this context: it is in no fixed proportion to the tokens")
    if tp > 1:
        repeated = any(name not in SHARED_OUT for layer in layers for name in layer.parts) or any(
            layer.parts and layer.heads < tp for layer in layers
        )
        notes.append(
            f"figures of one of {tp} devices"
            + ("; latents, and heads fewer than the devices, are repeated on them" if repeated else "")
        )
    return notes


def _one_or_all(values: list[Any]) -> Any:
    return values[0] if all(value == values[0] for value in values) else values


def cache_table(figures: Mapping[str, Any]) -> list[str]:
    """The lines that say the same to a person. figures["measured"], if it is there, gets a column beside the formula's."""
    width = figures["bytes_per_element"]
    columns: list[tuple[str, str, Mapping[str, Any]]] = [("cached", "", figures)]
    if "measured" in figures:
        columns = [("by formula", "", figures), ("measured", "", figures["measured"])]
    if figures.get("naive_elements_per_token", figures["elements_per_token"]) != figures["elements_per_token"]:
        columns.append(("expanded K and V", "naive_", figures))
    if "mha_elements_per_token" in figures:
        columns.append(("MHA of this shape", "mha_", figures))
    rows = [["", *(title for title, _, _ in columns)]]
    for title, key in (
        ("elements per token and layer", "elements_per_token_per_layer"),
        ("bytes per token and layer", "bytes_per_token_per_layer"),
        ("elements per token", "elements_per_token"),
        ("bytes per token", "bytes_per_token"),
        ("bytes in all", "total_bytes"),
    ):
        rows.append([title, *(_counted(source.get(f"{prefix}{key}")) for _, prefix, source in columns)])
    cached = figures["cached"] if isinstance(figures["cached"], list) else [figures["cached"]]
    kinds = dict.fromkeys(" + ".join(f"{part} {size:,}" for part, size in parts.items()) for parts in cached if parts)
    lines = [
        f"{figures['name']} ({figures['model_type']}): {figures['layers']} layers; per token and layer "
        f"{', or '.join(kinds) or 'nothing'}",
        f"{figures['dtype']}, {width:g} byte{'s' if width > 1 else ''} an element; context {figures['context']:,}, "
        f"batch {figures['batch']:,}",
        "",
        *aligned(rows),
    ]
    if len(figures["kinds"]) > 1:
        rows = [["layers of each kind", "layers", "tokens held", "bytes"]]
        rows += [
            [kind["kind"], f"{kind['layers']:,}", _counted(kind["tokens"]), f"{kind['bytes']:,}"] for kind in figures["kinds"]
        ]
        lines += ["", *aligned(rows)]
    total = f"{_in_bytes(figures['total_bytes'])} in all"
    if figures["state_bytes"]:
        total += f", {_in_bytes(figures['state_bytes'])} of it states; {_in_bytes(figures['kv_bytes'])} without them"
    if figures["mha_ratio"] is not None:
        total += f"; {_compared(figures['mha_ratio'])}"
    lines += ["", total]
    if figures["memory_gb"] is not None:
        lines.append(f"largest batch in {figures['memory_gb']:g} GB: {figures['largest_batch']:,}")
    if figures["parameters_per_layer"] is not None:
        lines += ["", *aligned(_latent_rows(figures))]
    if figures["scales"]:
        lines.append(f"note: {figures['dtype']}: {figures['scales']}")
    return [*lines, *(f"note: {note}" for note in figures["notes"])]


def _latent_rows(figures: Mapping[str, Any]) -> list[list[str]]:
    """What MLA's shape says of parameters and arithmetic."""
    own, merged = figures["parameters_per_layer"], figures["parameters_per_layer_premerged"]
    mha, macs = figures["parameters_per_layer_mha"], figures["macs_per_cached_token"]
    attention = macs["expand"] - macs["expand_up_projection"]
    return [
        ["parameters of an attention layer", f"{own:,}"],
        ["  absorbed weights merged beforehand", f"{merged:,}", f"{merged / own:.2f} times"],
        ["  MHA of this shape", f"{mha:,}", f"{mha / own:.2f} times"],
        ["multiply-adds per new and cached token, a layer"],
        ["  absorbed", f"{macs['absorbed']:,}"],
        ["  expanded: attention", f"{attention:,}"],
        [
            "  expanded: up-projection of the cache",
            f"{macs['expand_up_projection']:,}",
            f"{macs['expand_up_projection'] / attention:.1f} times the attention",
        ],
        ["  MHA of this shape", f"{macs['mha']:,}"],
    ]


def _counted(value: int | list[int] | None) -> str:
    """A number, or how many layers have which."""
    if isinstance(value, list):
        return ", ".join(f"{n} x {each:,}" for each, n in sorted(Counter(value).items(), reverse=True))
    return "-" if value is None else f"{value:,}"


def _in_bytes(count: int) -> str:
    """In decimal and binary units."""
    power = next((power for power in (4, 3, 2) if count >= 1000**power), 1)
    unit = "kMGT"[power - 1]
    return f"{count / 1000**power:,.2f} {unit}B ({count / 1024**power:,.2f} {unit.upper()}iB)"


def _compared(ratio: float) -> str:
    if ratio == 1:
        return "as large as MHA of this shape"
    factor, word = (ratio, "smaller") if ratio > 1 else (1 / ratio, "larger")
    return f"{factor:.{1 if factor >= 10 else 2}f} times {word} than MHA of this shape"
