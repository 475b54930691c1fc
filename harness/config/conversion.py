"""What to make of a run without training it, as scripts/convert.py and a study's `convert:` say it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Literal

from harness.config.typed import typed
from harness.errors import UserError

Method = Literal["transmla", "mha2mla", "exact", "gqa_mean"]


@dataclass
class ConversionConfig:
    """Fields of other methods than the chosen one are left at their defaults."""

    method: Method
    kv_lora_rank: Annotated[int | None, "transmla, mha2mla: width of the latent"] = None
    qk_rope_head_dim: Annotated[int | None, "transmla, mha2mla: rotated width that is cached, all heads together"] = None
    n_kv_heads: Annotated[int | None, "gqa_mean: heads that are left"] = None
    rope_mode: Annotated[
        Literal["repeat", "extend", "after_up"],
        "exact: repeat (each head's frequencies, absorbable), extend (one table over all dimensions: not exact) or after_up "
        "(latents expanded, then rotated)",
    ] = "repeat"
    kv_latent: Annotated[
        Literal["joint", "split"], "transmla, mha2mla: joint, or split (keys and values in halves of their own)"
    ] = "joint"
    latent_norm: Annotated[
        Literal["none", "rms"],
        "transmla, mha2mla: none, or rms: an RMSNorm to be trained in, as stock DeepSeek models have one",
    ] = "none"
    fold: Annotated[int | None, "transmla: neighbouring frequencies turned as one; null: what validation prefers"] = None
    balance: Annotated[
        bool | None, "keys scaled to the values' energy before the low rank; null: true for transmla, else false"
    ] = None
    basis: Annotated[
        Literal["activations", "weights"] | None, "of the low rank: activations or weights; null: as the method's paper"
    ] = None
    calibration_tokens: Annotated[int, "of the training split, at least four times kv_lora_rank"] = 65_536


_LOW_RANK = ("transmla", "mha2mla")
# What a method cannot do without, and the methods that an option says something to.
_NEEDED = {"kv_lora_rank": _LOW_RANK, "qk_rope_head_dim": _LOW_RANK, "n_kv_heads": ("gqa_mean",)}
_OWN = {"rope_mode": ("exact",), "fold": ("transmla",)} | dict.fromkeys(
    ("kv_latent", "latent_norm", "balance", "basis"), _LOW_RANK
)


def check_conversion(options: ConversionConfig) -> None:
    """Raises UserError for options that do not go together, before anything is loaded."""
    typed(ConversionConfig, dataclasses.asdict(options), "")
    plain = ConversionConfig(options.method)
    for name, methods in (_NEEDED | _OWN).items():
        value = getattr(options, name)
        if options.method not in methods and value != getattr(plain, name):
            raise UserError(f"{name}={value} says nothing to method={options.method}: leave it out")
        if name in _NEEDED and options.method in methods and (value is None or value < 1):
            raise UserError(f"method={options.method} needs {name}, a whole number of at least 1: give {name}=N")
