"""The size of a key/value cache by arithmetic, and what else follows from the shape of an MLA layer.

Cached elements per token and layer (DeepSeek-V2, arXiv 2405.04434, section 2.1.3 and table 1), with H query heads,
G key/value heads, d their width, and MLA's n = qk_nope_head_dim, r = qk_rope_head_dim, v = v_head_dim:

    GQA (MHA: G = H, MQA: G = 1)    2 G d
    MLA                             kv_lora_rank + r
    MLA cached expanded             H (n + r + v)
    MHA of MLA's shape              H (n + v)

harness/evaluation/hf_config.py describes the cache of a Hugging Face model, `describe_model` that of one built here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from harness.errors import UserError
from modeling.gpt import GPT

# Bytes of one element. fp8 and int8 are the elements alone: scales of a quantised cache come on top.
DTYPES = {"float32": 4, "fp32": 4, "bfloat16": 2, "bf16": 2, "float16": 2, "fp16": 2, "fp8": 1, "int8": 1}


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
            self._down + self._queries(self.kv_lora_rank + self.qk_rope_head_dim)
            + self.n_heads * self.kv_lora_rank * self.d_model
        )  # fmt: skip

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
    """What one layer keeps of one token."""

    parts: Mapping[str, int]  # elements by what they are; empty: nothing that grows with the context
    naive: int  # elements if MLA were cached expanded; those of `parts` otherwise
    mha: int  # elements of MHA of the same shape
    window: int | None = None  # tokens kept at most; None: all

    @property
    def elements(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class CacheDescription:
    """The cache of a whole model. `latent` is given where all layers are plain MLA of one shape."""

    name: str
    model_type: str
    layers: tuple[LayerCache, ...]
    latent: LatentShape | None = None
    notes: tuple[str, ...] = ()

    def elements(self, elements_of: Callable[[LayerCache], int], context: int) -> int:
        """Elements of one sequence: a layer with a window stops growing at it."""
        return sum(elements_of(layer) * min(context, layer.window or context) for layer in self.layers)


# What is cached -> what a layer would take: as it is, MLA expanded, MHA of the same shape.
_WAYS: dict[str, Callable[[LayerCache], int]] = {
    "": lambda layer: layer.elements,
    "naive_": lambda layer: layer.naive,
    "mha_": lambda layer: layer.mha,
}


def describe_model(
    model: GPT, *, name: str, variant: str, mha_elements: int, latent: LatentShape | None
) -> CacheDescription:
    """The cache of one of our models by its layers' formulas. mha_elements: of MHA with the same heads, a layer."""
    layers = []
    for attention in model.attentions:
        formula = attention.cache_formula
        expanded = formula
        if formula and getattr(attention, "kv_lora_rank", None) is not None:
            expanded = attention.n_kv_heads * (attention.qk_width + attention.v_head_dim)
        layers.append(LayerCache({"cached": formula} if formula else {}, expanded, mha_elements))
    return CacheDescription(name, variant, tuple(layers), latent)


def report(
    description: CacheDescription, *, dtype: str, context: int, batch: int, memory_gb: float | None
) -> dict[str, Any]:
    """All figures as one JSON object. Lists stand where layers differ, in the order of the layers."""
    layers, width, latent = description.layers, DTYPES[dtype], description.latent
    figures: dict[str, Any] = {
        "name": description.name,
        "model_type": description.model_type,
        "layers": len(layers),
        "dtype": dtype,
        "bytes_per_element": width,
        "context": context,
        "batch": batch,
        "window": _one_or_all([layer.window for layer in layers]),
        "cached": _one_or_all([dict(layer.parts) for layer in layers]),
    }
    for prefix, elements_of in _WAYS.items():
        by_layer = [elements_of(layer) for layer in layers]
        figures |= {
            f"{prefix}elements_per_token_per_layer": _one_or_all(by_layer),
            f"{prefix}bytes_per_token_per_layer": _one_or_all([elements * width for elements in by_layer]),
            f"{prefix}elements_per_token": sum(by_layer),
            f"{prefix}bytes_per_token": sum(by_layer) * width,
            f"{prefix}total_bytes": description.elements(elements_of, context) * width * batch,
        }
    if figures["elements_per_token"] == 0:
        raise UserError(
            f"{description.name} has no layer whose cache grows with the context: there is nothing to count"
        )
    sequence = figures["total_bytes"] // batch
    return figures | {
        "mha_ratio": figures["mha_elements_per_token"] / figures["elements_per_token"],
        "memory_gb": memory_gb,
        "largest_batch": None if memory_gb is None else int(memory_gb * 1e9 // sequence),
        "parameters_per_layer": latent.parameters if latent is not None else None,
        "parameters_per_layer_premerged": latent.parameters_premerged if latent is not None else None,
        "parameters_per_layer_mha": latent.parameters_mha if latent is not None else None,
        "macs_per_cached_token": latent.macs_per_cached_token if latent is not None else None,
        "notes": list(description.notes),
    }


def _one_or_all(values: list[Any]) -> Any:
    return values[0] if all(value == values[0] for value in values) else values


def table(figures: Mapping[str, Any]) -> list[str]:
    """The lines that say the same to a person. figures["measured"], if it is there, gets a column beside the formula's."""
    width = figures["bytes_per_element"]
    columns: list[tuple[str, str, Mapping[str, Any]]] = [("cached", "", figures)]
    if "measured" in figures:
        columns = [("by formula", "", figures), ("measured", "", figures["measured"])]
    if figures["naive_elements_per_token"] != figures["elements_per_token"]:
        columns.append(("expanded K and V", "naive_", figures))
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
        f"{', or '.join(kinds)}",
        f"{figures['dtype']}, {width} byte{'s' if width > 1 else ''} an element; context {figures['context']:,}, "
        f"batch {figures['batch']:,}",
        "",
        *_aligned(rows),
        "",
        f"{_in_bytes(figures['total_bytes'])} in all; {_compared(figures['mha_ratio'])}",
    ]
    if figures["memory_gb"] is not None:
        lines.append(f"largest batch in {figures['memory_gb']:g} GB: {figures['largest_batch']:,}")
    if figures["parameters_per_layer"] is not None:
        lines += ["", *_aligned(_latent_rows(figures))]
    if width == 1:
        lines.append("note: a byte an element; scales, and parts kept in 16 bits, come on top")
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
        ["  expanded: up-projection of the cache", f"{macs['expand_up_projection']:,}",
         f"{macs['expand_up_projection'] / attention:.1f} times the attention"],
        ["  MHA of this shape", f"{macs['mha']:,}"],
    ]  # fmt: skip


def _aligned(rows: list[list[str]]) -> list[str]:
    """The first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows)))]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows
    ]  # fmt: skip


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
