"""Fair comparisons by construction: sizes solved so that arms agree in parameters, training FLOPs or cache bytes.

A match names a quantity, what it shall equal (another arm's, or a number) and the field that is free. The quantity is
read off the model itself, built without memory on the meta device, and is monotone in every field that may be free, so
that bisection over the legal values finds the nearest. What is left over is printed before anything runs and refused
above a tolerance.
"""

from __future__ import annotations

import bisect
import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from harness.config.build import model_shapes
from harness.config.schema import TrainConfig
from harness.errors import UserError
from harness.files.text import number
from harness.files.untrusted import Figure, Positive
from harness.runs.records import MatchRecord
from modeling.attention.layer_cache import formula_bytes_at
from modeling.attention.quantisation import cache_format
from modeling.flops import parameters_by_block, training_flops_per_token

QUANTITIES = {"params": "parameters", "train_flops": "training FLOPs per token", "kv_bytes": "cache bytes per token"}


@dataclass
class MatchConfig:
    """One quantity made equal."""

    quantity: str  # none | params | train_flops | kv_bytes
    to: str = ""  # an arm, or a number (kv_bytes: bytes per token of all layers in cache.dtype)
    vary: str = ""  # the free field; several, separated by commas, take one value
    tolerance: Figure = 0.01  # of the target
    multiple_of: Positive = 1


# Fields that may be free -> all values that may be tried, in rising order, for a configuration.
FREE: dict[str, Callable[[TrainConfig], Sequence[int]]] = {
    "model.mlp_hidden": lambda config: range(8, 64 * config.model.d_model),
    # A pattern of layers stands in a model at least once.
    "model.n_layers": lambda config: range(len(config.attention.get("layers", "1")), 8 * config.model.n_layers + 1),
    "attention.kv_lora_rank": lambda config: range(1, 4 * config.model.d_model + 1),
    "attention.q_lora_rank": lambda config: range(1, config.model.d_model + 1),
    "attention.qk_rope_head_dim": lambda config: range(2, config.model.d_model + 1, 2),
    "attention.n_kv_heads": lambda config: [g for g in range(1, config.model.n_heads + 1) if config.model.n_heads % g == 0],
    "attention.head_dim": lambda config: range(2, 4 * config.model.d_model + 1, 2),
    "attention.v_head_dim": lambda config: range(2, 4 * config.model.d_model + 1, 2),
}


def quantities(config: TrainConfig, vocab_size: int) -> dict[str, int]:
    """params, train_flops (per token) and kv_bytes (per token, all layers, in cache.dtype) of a configuration.

    Where layers have windows, kv_bytes are those of max_seq_len tokens, per token.

    Raises UserError for sizes that do not fit together, and for a cache.dtype that the variant cannot keep.
    """
    model = model_shapes(config, vocab_size)
    dtype, context = cache_format(config.cache.dtype), config.model.max_seq_len
    return {
        "params": parameters_by_block(model)["total"],
        "train_flops": training_flops_per_token(model, context),
        "kv_bytes": round(sum(formula_bytes_at(layer, dtype, context) for layer in model.attentions) / context),
    }


def match_arm(
    arm: str, config: TrainConfig, matches: Sequence[MatchConfig], *, vocab_size: int, others: Mapping[str, Mapping[str, int]]
) -> tuple[list[str], list[MatchRecord]]:
    """The overrides that make this arm equal what its matches name, solved one after the other, and how well they do.

    others: quantities of the arms that may be named as a target. Raises UserError above a tolerance, naming the nearest.
    """
    overrides: list[str] = []
    solved: list[tuple[MatchConfig, int, float]] = []
    last = ""
    for match in matches:
        if match.quantity == "none" or match.to == arm:
            continue
        target = _target(arm, match, others)
        fields = [field.strip() for field in match.vary.split(",")]
        value, achieved = _solve(arm, config, match, fields, target, vocab_size)
        last = f"{match.vary}={value}"
        _mismatch(f"arm {arm}: {last} comes nearest, and", match, achieved, target, "raise it, or free another field")
        config = with_values(config, fields, value)
        overrides += [f"{field}={value}" for field in fields]
        solved.append((match, value, target))
    reached = quantities(config, vocab_size) if solved else {}
    results: list[MatchRecord] = []
    for match, value, target in solved:
        undone = f"arm {arm}: what {match.vary}={value} matched was undone by {last}, and"
        achieved, remedy = reached[match.quantity], f"match {match.quantity} last, or by another field"
        results.append(
            {
                "quantity": match.quantity,
                "to": match.to,
                "vary": match.vary,
                "value": value,
                "target": target,
                "achieved": achieved,
                "mismatch": _mismatch(undone, match, achieved, target, remedy),
            }
        )
    return overrides, results


def _mismatch(how: str, match: MatchConfig, achieved: float, target: float, remedy: str) -> float:
    """As a share of the target. Raises UserError above the tolerance."""
    mismatch = achieved / target - 1
    if abs(mismatch) > match.tolerance:
        raise UserError(
            f"{how} {achieved:,.0f} {QUANTITIES[match.quantity]} lie {number(mismatch, '+.1%')} from {target:,.0f}, "
            f"outside the tolerance of {match.tolerance:.1%}: {remedy}"
        )
    return mismatch


def _target(arm: str, match: MatchConfig, others: Mapping[str, Mapping[str, int]]) -> float:
    if match.quantity not in QUANTITIES:
        raise UserError(f"arm {arm}: quantity={match.quantity} is unknown; choose none, {', '.join(QUANTITIES)}")
    if match.to in others:
        return others[match.to][match.quantity]
    try:
        target = float(match.to)
    except ValueError:
        raise UserError(
            f"arm {arm} is matched to {match.to or 'nothing'}, which is neither an arm nor a number; arms here: "
            f"{', '.join(others) or 'none'}"
        ) from None
    if not target > 0:
        raise UserError(f"arm {arm}: a target of {match.to} {QUANTITIES[match.quantity]} must be above 0")
    return target


def _solve(
    arm: str, config: TrainConfig, match: MatchConfig, fields: Sequence[str], target: float, vocab_size: int
) -> tuple[int, float]:
    """The legal value whose quantity is nearest to the target."""
    for field in fields:
        if field not in FREE or (field.startswith("attention.") and field.partition(".")[2] not in config.attention):
            known = [name for name in FREE if not name.startswith("attention.") or name[10:] in config.attention]
            raise UserError(f"arm {arm}: {field or 'nothing'} cannot be varied here; choose from {', '.join(known)}")
    values = [value for value in FREE[fields[0]](config) if value % match.multiple_of == 0]
    tried: dict[int, float | None] = {}
    refusals: list[str] = []

    def quantity(value: int) -> float | None:
        if value not in tried:
            try:
                tried[value] = quantities(with_values(config, fields, value), vocab_size)[match.quantity]
            except UserError as error:
                refusals.append(str(error))
                tried[value] = None
        return tried[value]

    def too_large(value: int) -> bool:  # what the class refuses is beyond what it can be
        reached = quantity(value)
        return reached is None or reached >= target

    place = bisect.bisect_left(values, True, key=too_large)
    near = {value: reached for value in values[max(0, place - 1) : place + 1] if (reached := quantity(value)) is not None}
    if not near:
        raise UserError(f"arm {arm}: no value of {match.vary} can be built ({refusals[0] if refusals else 'none is legal'})")
    best = min(near, key=lambda value: abs(near[value] - target))
    return best, near[best]


def with_values(config: TrainConfig, fields: Sequence[str], value: int) -> TrainConfig:
    """The configuration with these fields at this value; what was derived from them stays as it is."""
    changed = copy.deepcopy(config)
    for field in fields:
        group, _, key = field.partition(".")
        if group == "attention":
            changed.attention[key] = value
        else:
            setattr(changed.model, key, value)
    return changed
