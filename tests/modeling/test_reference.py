"""Every class equals what docs/ATTENTION.md writes (reference.py), in float64, over random values of every knob."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from modeling.attention import EXECUTION, MECHANISMS, MODEL_OWNED, build_attentions
from modeling.attention.contract import randomise, relative_error
from modeling.attention.layer_cache import new_cache
from tests.modeling import reference

TOKENS, LONGEST, DRAWS = 11, 16, 80
CLOSE = 1e-11


def _scaling(draw: random.Random) -> dict[str, Any] | None:
    kind = draw.choice([None, None, "linear", "llama3", "yarn", "yarn", "yarn"])
    if kind is None:
        return None
    scaling: dict[str, Any] = {"rope_type": kind, "factor": draw.choice([0.5, 2.0, 40.0])}
    if kind == "linear":
        return scaling
    scaling["original_max_position_embeddings"] = draw.choice([4, 16, 4096])
    if kind == "llama3":
        return scaling | {"low_freq_factor": 1.0, "high_freq_factor": draw.choice([1.5, 4.0])}
    optional: dict[str, list[Any]] = {
        "beta_fast": [None, 2, 32],
        "beta_slow": [None, 0.25, 1],
        "attention_factor": [None, 0.7],
        "mscale": [None, 0, 0.7],
        "mscale_all_dim": [None, 0, 0.9],
        "truncate": [True, False],
    }
    for field, values in optional.items():
        if draw.random() < 0.6:
            scaling[field] = draw.choice(values)
    return scaling


def _sizes(draw: random.Random) -> dict[str, Any]:
    return {
        "d_model": draw.choice([16, 24]),
        "n_heads": draw.choice([2, 4]),
        "max_seq_len": LONGEST,
        "causal": draw.random() < 0.8,
        "bias": draw.random() < 0.3,
        "norm_eps": draw.choice([1e-6, 1e-2, 0.3]),
    }


def _grouped(draw: random.Random) -> dict[str, Any]:
    positions = draw.choice(["rope", "learned", "none", "decoupled"])
    return {
        "n_kv_heads": draw.choice([1, 2, 4]),
        "head_dim": draw.choice([4, 6, 10]),
        "v_head_dim": draw.choice([3, 6, 9]),
        "qk_rope_head_dim": draw.choice([2, 6]) if positions == "decoupled" else 0,
        "positions": positions,
        "rope_theta": draw.choice([3.0, 100.0, 10000.0]),
        "qk_norm": draw.random() < 0.5,
        "q_lora_rank": draw.choice([None, 5, 8]),
        "dropout": 0.0,
        "gate": draw.choice(["none", "element", "head"]),
        "projection_bias": draw.choice(["model", "qkv", "all"]),
        "rope_scaling": _scaling(draw) if positions in ("rope", "decoupled") else None,
        "window": draw.choice([None, None, 1, 2, 4, 5, 20]),
        "sink_logits": draw.random() < 0.4,
        "rotary_fraction": draw.choice([1.0, 0.5]) if positions == "rope" else 1.0,
    }


def _tied(draw: random.Random) -> dict[str, Any]:
    return {
        "n_kv_heads": draw.choice([1, 2, 4]),
        "head_dim": draw.choice([4, 6, 10]),
        "qk_rope_head_dim": draw.choice([2, 4, 6]),
        "keys": draw.choice(["joined", "turned", "stored"]),
        "rope_theta": draw.choice([3.0, 100.0, 10000.0]),
        "dropout": 0.0,
        "gate": draw.choice(["none", "element", "head"]),
        "qk_norm": draw.random() < 0.4,
    }


def _tensor_product(draw: random.Random) -> dict[str, Any]:
    return {
        "head_dim": draw.choice([2, 4, 6]),
        "q_rank": draw.choice([1, 2, 3, 4]),
        "k_rank": draw.choice([1, 2, 3]),
        "v_rank": draw.choice([1, 2, 4]),
        "rope_theta": draw.choice([3.0, 100.0, 10000.0]),
        "dropout": 0.0,
        "gate": draw.choice(["none", "element", "head"]),
        "qk_norm": draw.random() < 0.5,
    }


def _latent(draw: random.Random) -> dict[str, Any]:
    positions = draw.choice(["decoupled", "decoupled", "learned", "none", "rope_after_up"])
    rotates = positions in ("decoupled", "rope_after_up")
    stored = rotates and draw.random() < 0.2
    sharing = draw.choice(["none", "none", "weights", "latent"])
    return {
        "n_kv_heads": draw.choice([1, 2, 4]),
        "q_lora_rank": draw.choice([None, None, 5, 8]),
        "kv_lora_rank": draw.choice([4, 6, 10]),
        "qk_nope_head_dim": draw.choice([4, 6]),
        "qk_rope_head_dim": draw.choice([2, 6]) if positions == "decoupled" else 0,
        "v_head_dim": draw.choice([3, 5, 8]),
        "latent": draw.choice(["learned", "learned", "frozen", "slice"]),
        "kv_latent": draw.choice(["joint", "split"]),
        "latent_groups": draw.choice([1, 2, 4]),
        "latent_norm": draw.choice(["rms", "layer", "none"]),
        "latent_norm_place": draw.choice(["latent", "up_projected"]),
        "latent_scale": draw.random() < 0.5,
        "positions": positions,
        "rope_theta": draw.choice([3.0, 100.0, 10000.0]),
        "fused_down_projections": draw.random() < 0.25,
        "sharing": sharing,
        "sharing_layers": 1 if sharing == "none" else draw.choice([2, 3]),
        "dropout": 0.0,
        "gate": draw.choice(["none", "element", "head"]),
        "projection_bias": draw.choice(["model", "all"]),
        "rope_scaling": _scaling(draw) if rotates and not stored else None,
        "rope_frequencies": "stored" if stored else "computed",
        "qk_norm": draw.random() < 0.3,
        "sink_logits": draw.random() < 0.4,
        "window": draw.choice([None, None, 1, 2, 4, 5, 20]),
    }


def _draws(mechanism: str, draw_options: Callable[[random.Random], dict[str, Any]]) -> list[dict[str, Any]]:
    """So many combinations that the class takes: {"options", "sizes", "layers"}."""
    draw, found = random.Random(20260101), []
    while len(found) < DRAWS:
        options, sizes = draw_options(draw), _sizes(draw)
        try:
            layers = build_attentions(mechanism, options, options.get("sharing_layers", 1), **sizes)
        except ValueError:
            continue
        found.append({"options": options, "sizes": sizes, "layers": layers})
    return found


def _inputs(count: int, d_model: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, TOKENS, d_model, dtype=torch.float64, generator=generator) for _ in range(count)]


def _prepared(layers: list[Any]) -> list[Any]:
    for number, layer in enumerate(layers):
        randomise(layer.double().eval(), seed=number)
        if layer.rope is not None and "rope._extra_state" in layer.state_dict():
            some = torch.rand(layer.rope.frequencies_F.shape, dtype=torch.float64)
            layer.rope.set_extra_state(some)
    return layers


def _run(layers: list[Any], inputs: list[Tensor], split: list[int] | None, **cache_options: Any) -> list[Tensor]:
    """The output of every layer: at once, or in pieces through a cache."""
    caches: list[Any] = [None] * len(layers)
    if split is not None:
        caches = [new_cache(layer, 2, LONGEST, dtype=torch.float64, device="cpu", **cache_options) for layer in layers]
    pieces: list[list[Tensor]] = [[] for _ in layers]
    for part in zip(*(x_BTD.split(split or [TOKENS], dim=1) for x_BTD in inputs), strict=True):
        shared: list[Tensor] = []
        for number, (layer, x_BTD) in enumerate(zip(layers, part, strict=True)):
            more = {"shared": shared} if getattr(layer, "sharing", "none") == "latent" else {}
            pieces[number].append(layer(x_BTD, caches[number], **more))
    return [torch.cat(each, dim=1) for each in pieces]


def _wanted(mechanism: str, case: dict[str, Any], inputs: list[Tensor], **window: Any) -> list[Tensor]:
    options, sizes = case["options"], case["sizes"]
    seen_TS = reference.visible(TOKENS, causal=sizes["causal"], **({"window": None, "sinks": 0} | window))
    outputs, leader = [], None
    for layer, x_BTD in zip(case["layers"], inputs, strict=True):
        state = layer.state_dict()
        if mechanism in ALONE:
            outputs.append(ALONE[mechanism](options, sizes, state, x_BTD, seen_TS))
            continue
        out_BTD, cached = reference.latent(options, sizes, state, x_BTD, seen_TS, leader)
        outputs.append(out_BTD)
        leader = cached if options["sharing"] == "latent" else None
    return outputs


FAMILIES = {"gqa": _grouped, "mla": _latent, "tied": _tied, "tpa": _tensor_product}
ALONE = {"gqa": reference.grouped, "tied": reference.tied, "tpa": reference.tensor_product}  # a layer needs no other


@pytest.mark.parametrize("mechanism", FAMILIES)
@torch.no_grad()
def test_every_combination_of_knobs_computes_what_the_documents_equations_say(mechanism: str) -> None:
    for number, case in enumerate(_draws(mechanism, FAMILIES[mechanism])):
        layers = _prepared(case["layers"])
        inputs = _inputs(len(layers), case["sizes"]["d_model"])
        wanted = _wanted(mechanism, case, inputs)
        ways: dict[str, tuple[list[Tensor], list[Tensor]]] = {"at once": (_run(layers, inputs, None), wanted)}
        if case["sizes"]["causal"]:
            for path in layers[0].decode_paths:
                for layer in layers:
                    layer.decode = path
                ways[f"cache, {path}"] = _run(layers, inputs, [5, 1, 3, 1, 1]), wanted
            window = {"window": 3, "sinks": 2}
            ways["window"] = _run(layers, inputs, [5, 1, 3, 1, 1], **window), _wanted(mechanism, case, inputs, **window)
        for way, (got, right) in ways.items():
            for layer, (ours, theirs) in enumerate(zip(got, right, strict=True)):
                error = relative_error(ours, theirs)
                assert error < CLOSE, f"case {number}, {way}, layer {layer}: {error:.1e}; {case['options']} {case['sizes']}"


@pytest.mark.parametrize("mechanism", FAMILIES)
def test_the_drawn_knobs_are_all_that_the_class_has_and_take_all_their_values(mechanism: str) -> None:
    cases = _draws(mechanism, FAMILIES[mechanism])
    parameters = set(inspect.signature(MECHANISMS[mechanism].__init__).parameters) - {"self"}
    assert {*cases[0]["options"], *cases[0]["sizes"]} == parameters and set(cases[0]["sizes"]) == set(MODEL_OWNED)
    assert not set(EXECUTION) & parameters
    draw = random.Random(0)
    many = [FAMILIES[mechanism](draw) for _ in range(2000)]
    for knob in cases[0]["options"]:
        wanted = {str(options[knob]) for options in many}
        if knob == "rope_scaling":  # combinations of six fields: its kinds, and each field, are enough
            wanted = {str(None if options[knob] is None else options[knob]["rope_type"]) for options in many}
            drawn = {str(None if c["options"][knob] is None else c["options"][knob]["rope_type"]) for c in cases}
        else:
            drawn = {str(case["options"][knob]) for case in cases}
        assert drawn == wanted, f"{knob}: {sorted(wanted - drawn)} never drawn"
