"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), half-split layout as in Llama.

Dimension i is paired with i + P/2 and turned by position * theta^(-2i/P). Letters: B batch, T tokens, H heads,
P rotated width, F = P/2 frequencies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from modeling.attention.positions import beyond, check_positions
from modeling.refusal import Refusal

# The fields of each kind of scaling, in Hugging Face's words, and those that may be left out.
SCALINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
    ),
}


def rope_frequencies(width: int, theta: float) -> Tensor:
    """theta^(-2i/width) for i < width/2, float64 on the CPU."""
    return theta ** (-torch.arange(0, width, 2, dtype=torch.float64, device="cpu") / width)


def scaled_frequencies(width: int, theta: float, scaling: Mapping[str, Any] | None) -> tuple[Tensor, float]:
    """(frequencies, factor of cosine and sine) of a rotation that was stretched to longer contexts.

    scaling names its rope_type and that type's fields, as in Hugging Face's rope_parameters: `linear` (arXiv 2306.15595),
    `yarn` (arXiv 2309.00071, section 3; mscale and mscale_all_dim as in DeepSeek-V2) or `llama3` (Llama 3.1). None: as trained.
    Raises Refusal for another type, or fields that it lacks or does not have.
    """
    frequencies_F = rope_frequencies(width, theta)
    if scaling is None:
        return frequencies_F, 1.0
    _check_scaling(scaling)
    kind, stretched_F = scaling["rope_type"], frequencies_F / scaling["factor"]
    if kind == "linear":
        return stretched_F, 1.0
    trained = scaling["original_max_position_embeddings"]
    if kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns_F = trained * frequencies_F / (2 * math.pi)  # within the context trained on
        keep_F = ((turns_F - low) / (high - low)).clamp(0.0, 1.0)
        return keep_F * frequencies_F + (1 - keep_F) * stretched_F, 1.0
    # Pairs that turn beta_fast times within the trained context stay, those below beta_slow turns are stretched.
    bounds = [
        width * math.log(trained / (2 * math.pi * (scaling.get(field) or usual))) / (2 * math.log(theta))
        for field, usual in (("beta_fast", 32), ("beta_slow", 1))
    ]
    if scaling.get("truncate", True):
        bounds = [math.floor(bounds[0]), math.ceil(bounds[1])]
    first, last = max(bounds[0], 0), min(bounds[1], width - 1)
    last = last if last != first else first + 0.001
    stretch_F = ((torch.arange(width // 2, dtype=torch.float64, device="cpu") - first) / (last - first)).clamp(0.0, 1.0)
    return (1 - stretch_F) * frequencies_F + stretch_F * stretched_F, _yarn_factor(scaling)


def logit_factor(scaling: Mapping[str, Any] | None) -> float:
    """What DeepSeek multiplies MLA's 1/sqrt(N + P) by: the square of YaRN's 0.1 mscale_all_dim ln(factor) + 1, else 1."""
    if scaling is None or not scaling.get("mscale_all_dim"):
        return 1.0
    return _mscale(scaling["factor"], scaling["mscale_all_dim"]) ** 2


def _mscale(factor: float, weight: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _yarn_factor(scaling: Mapping[str, Any]) -> float:
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    factor, weight, all_dims = scaling["factor"], scaling.get("mscale"), scaling.get("mscale_all_dim")
    return _mscale(factor, weight) / _mscale(factor, all_dims) if weight and all_dims else _mscale(factor)


def _check_scaling(scaling: Mapping[str, Any]) -> None:
    kind = scaling.get("rope_type")
    if kind not in SCALINGS:
        raise Refusal(f"rope_scaling.rope_type={kind} is unknown here; choose linear, llama3 or yarn, or no rope_scaling")
    needed, optional = SCALINGS[kind]
    given = set(scaling) - {"rope_type"}
    lacking, odd = sorted(set(needed) - given), sorted(given - {*needed, *optional})
    if lacking or odd:
        problem = f"lacks {', '.join(lacking)}" if lacking else f"has {', '.join(odd)}, which it does not know"
        raise Refusal(f"rope_scaling of rope_type={kind} {problem}; its fields are {', '.join((*needed, *optional))}")
    for field in sorted(given - {"truncate"}):
        value = scaling[field]
        absent = field in optional and value in (None, 0)
        if not absent and (isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf):
            raise Refusal(f"rope_scaling.{field}={value} must be a number above 0")
    if kind == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        raise Refusal(
            f"rope_scaling.high_freq_factor={scaling['high_freq_factor']} must be above "
            f"low_freq_factor={scaling['low_freq_factor']}"
        )


class RotaryEmbedding(nn.Module):
    """Cosine and sine tables of shape (max_seq_len, P/2), real, never below float32 whatever dtype the model is cast to.

    The frequencies are computed over the width that is rotated, so a narrow rotated part still spans the whole range.
    """

    cos_SF: Tensor
    sin_SF: Tensor

    def __init__(self, *, width: int, max_seq_len: int, theta: float, scaling: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        if width <= 0 or width % 2:
            raise Refusal(
                f"a rotated width of {width} cannot be paired; choose an even head_dim (qk_rope_head_dim if decoupled)"
            )
        if theta <= 0:
            raise Refusal(f"rope_theta={theta} must be positive; 10000 is usual")
        self.width, self.max_seq_len, self.theta, self.scaling = width, max_seq_len, theta, scaling
        self.frequencies_F, self.factor = scaled_frequencies(width, theta, scaling)
        self._build(torch.get_default_device(), torch.float32)

    def _build(self, device: torch.device, dtype: torch.dtype) -> None:
        if device.type == "meta":  # shapes alone; see modeling/shapes.py
            cos_SF, sin_SF = torch.empty(2, self.max_seq_len, len(self.frequencies_F), dtype=dtype, device=device)
        else:
            positions_S = torch.arange(self.max_seq_len, dtype=torch.float64, device=device)
            angle_SF = positions_S[:, None] * self.frequencies_F.to(device)
            cos_SF, sin_SF = ((self.factor * table_SF).to(dtype) for table_SF in (angle_SF.cos(), angle_SF.sin()))
        self.register_buffer("cos_SF", cos_SF, persistent=False)
        self.register_buffer("sin_SF", sin_SF, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryEmbedding:
        # module.to(bfloat16) would round the tables (position 257 becomes 256): move them, but rebuild their values.
        super()._apply(fn, recurse)
        self._rebuild()
        return self

    def _rebuild(self) -> None:
        device = self.cos_SF.device
        dtype = torch.float64 if self.cos_SF.dtype == torch.float64 else torch.float32
        if device.type == "mps":  # no float64 there
            self._build(torch.device("cpu"), dtype)
            self.cos_SF, self.sin_SF = self.cos_SF.to(device), self.sin_SF.to(device)
        else:
            self._build(device, dtype)

    def tables(self, start: int, length: int, positions_BT: Tensor | None, end: int | None = None) -> tuple[Tensor, Tensor]:
        """What `rotate` takes, each (1 or B, T, 1, P): of positions_BT where given, else of start..start+length-1.

        end: one above the largest of positions_BT, if a bound is known without looking (positions.py). Raises Refusal for
        positions that the model does not have.
        """
        if positions_BT is not None:
            check_positions(positions_BT, end, self.max_seq_len)
            return widened(self.cos_SF[positions_BT].unsqueeze(2), self.sin_SF[positions_BT].unsqueeze(2))
        if start + length > self.max_seq_len:
            raise beyond(start + length - 1, self.max_seq_len)
        rows = slice(start, start + length)
        return widened(self.cos_SF[rows][None, :, None], self.sin_SF[rows][None, :, None])

    @property
    def angles(self) -> Hashable:
        """What is equal where the tables are."""
        scaling = None if self.scaling is None else tuple(sorted(self.scaling.items()))
        return self.width, self.max_seq_len, self.theta, scaling


class StoredRotaryEmbedding(RotaryEmbedding):
    """Frequencies of any kind, in any order, kept with the weights: those of a converted layer differ from layer to layer.

    They are the module's extra state, so that no cast to another dtype rounds them: float64, shape (P/2,). Until a state is
    loaded they are theta^(-2i/P).
    """

    @property
    def angles(self) -> Hashable:
        return id(self)

    def get_extra_state(self) -> Tensor:
        return self.frequencies_F

    def set_extra_state(self, state: Tensor) -> None:
        if state.shape != self.frequencies_F.shape:
            raise Refusal(
                f"{tuple(state.shape)} frequencies were stored for a rotated width of {self.width}: the weights are of "
                f"another model"
            )
        self.frequencies_F = state.detach().to("cpu", torch.float64).clone()
        self._rebuild()


def widened(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Of F frequencies as `rotate` takes them: what a dimension is multiplied by, and what its partner is."""
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def partners(x: Tensor) -> Tensor:
    """Each of the last dimensions replaced by the one that it is turned with."""
    return torch.cat(x.chunk(2, dim=-1)[::-1], dim=-1)


def rotate_first(x_BTHK: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the first P of every head's K dimensions, as many as the tables have angles for; the others stay."""
    width = tables[0].shape[-1]
    if width == x_BTHK.shape[-1]:
        return rotate(x_BTHK, tables)
    turned_BTHP, still_BTHN = x_BTHK.split((width, x_BTHK.shape[-1] - width), dim=-1)
    return torch.cat((rotate(turned_BTHP, tables), still_BTHN), dim=-1)


def rotate_last(x_BTHK: Tensor, tables: tuple[Tensor, Tensor], gain_K: Tensor | None = None) -> Tensor:
    """Turn the last P of every head's K dimensions, after a gain, which goes to the tables: these are one for all rows."""
    P = tables[0].shape[-1]
    widths = x_BTHK.shape[-1] - P, P
    kept, turned = x_BTHK.split(widths, dim=-1)
    if gain_K is not None:
        kept_gain, gain_P = gain_K.split(widths)
        kept, tables = (kept * kept_gain).to(kept.dtype), (tables[0] * gain_P, tables[1] * partners(gain_P))
    turned = rotate(turned, tables)
    return turned if kept.shape[-1] == 0 else torch.cat((kept, turned), dim=-1)


def rotate(x_BTHP: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Turn every head's P dimensions by its token's angle, in float32 at least; dtype and shape are kept."""
    cos, sin = tables  # in float32 at least, and so is what they multiply
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return (x_BTHP * cos + partners(x_BTHP) * sin).to(x_BTHP.dtype)
    # Less than half of that goes through memory: keys that a cache holds un-rotated are all turned at every step.
    turned_BTHP = torch.empty_like(x_BTHP)
    halves = [each.chunk(2, dim=-1) for each in (x_BTHP, cos, sin, turned_BTHP)]
    for half, other in ((0, 1), (1, 0)):
        x, own_cos, own_sin, out = (each[half] for each in halves)
        torch.addcmul(x * own_cos, halves[0][other], own_sin, out=out)
    return turned_BTHP
