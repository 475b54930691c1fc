"""The contract of an attention variant as checks that run on any of them: tests and scripts/check_attention.py call these.

Every check takes `build`, which makes a fresh module on the CPU in float32, and raises AssertionError saying what broke.
The module is one layer, or several as AttentionLayers: where layers differ or share, all kinds of them are checked.
Parameters are first filled with seeded random values (zero-initialised outputs would pass anything). Relative error
means ||a - b|| / ||b|| over the whole tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from modeling.attention import attends
from modeling.attention.cache import Cache
from modeling.attention.layer_cache import (
    formula_bytes,
    formula_bytes_at,
    keys_seen,
    new_cache,
    sixteen_bits_of,
    states_of,
    value_names,
)
from modeling.attention.layers import AttentionLayers
from modeling.attention.quantisation import GROUP, NAMED, CacheFormat, cache_format
from modeling.refusal import Refusal

BATCH, TOKENS = 3, 24
# In few bits: the largest relative error of outputs against full precision, with logits as large as these.
FEW_BITS = {"int8": 0.1, "fp8": 0.3, "int4": 0.3, "k8v4": 0.2, "k4v16": 0.3, "int4_rotated": 0.3, "kc4v8": 0.3}
Variant = Any  # an nn.Module that keeps the Attention protocol, which Python cannot spell, or AttentionLayers of such
Build = Callable[[], Variant]


def relative_error(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||, computed in float64."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def randomise(module: Variant, seed: int = 0) -> Variant:
    """Fill every parameter so that signals keep their size and logits are large: matrices N(0, 2 / fan_in)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * (2 / parameter.shape[-1]) ** 0.5)
            else:
                parameter.copy_(1 + 0.1 * noise)
    return module


def _layers(build: Build) -> AttentionLayers:
    built = build()
    return built if isinstance(built, AttentionLayers) else AttentionLayers([built])


def _module_and_input(build: Build, tokens: int = TOKENS) -> tuple[AttentionLayers, Tensor]:
    module = randomise(_layers(build)).eval()
    width = module.attentions[0].o_proj.out_features
    return module, torch.randn(BATCH, tokens, width, generator=torch.Generator().manual_seed(1))


def _poisoned_cache(
    module: AttentionLayers, max_seq_len: int, dtype: torch.dtype | CacheFormat = torch.float32, **options: Any
) -> list[Cache]:
    """A cache full of NaN: a read beyond the length cannot go unnoticed."""
    cache = module.new_cache(BATCH, max_seq_len, dtype=dtype, device="cpu", **options)
    for layer in cache:
        for tensor in layer.growing():
            if tensor.is_floating_point():  # of the others the scales are poisoned
                tensor.fill_(float("nan"))
    return cache


def _lengths(cache: list[Cache]) -> list[list[int]]:
    return [layer.lengths_B.tolist() for layer in cache]


def _of_layer(module: AttentionLayers, index: int) -> str:
    """Which one, where there are several."""
    return f"layer {index}: " if len(module.attentions) > 1 else ""


@torch.no_grad()
def output_has_the_inputs_shape_and_dtype(build: Build) -> None:
    """(B, T, D) in, (B, T, D) of the same dtype out, finite and not small."""
    module, x_BTD = _module_and_input(build)
    out = module(x_BTD)
    assert out.shape == x_BTD.shape and out.dtype == x_BTD.dtype, f"{out.shape} {out.dtype}"
    assert out.isfinite().all() and out.std() > 0.05, f"outputs are nearly zero (standard deviation {out.std():.1e})"


@torch.no_grad()
def no_token_sees_the_future(build: Build) -> None:
    """Changing token t leaves every earlier output bit-equal, and changes token t's."""
    module, x_BTD = _module_and_input(build)
    before = module(x_BTD)
    for t in (1, TOKENS // 2, TOKENS - 1):
        changed = x_BTD.clone()
        changed[:, t] += 1.0
        after = module(changed)
        assert torch.equal(before[:, :t], after[:, :t]), f"outputs before token {t} changed with it"
        assert relative_error(after[:, t], before[:, t]) > 1e-3, f"the output at token {t} ignores it"


@torch.no_grad()
def cached_decoding_equals_the_full_forward(build: Build) -> None:
    """Through the cache in one piece, prefill + single tokens, uneven chunks, all singles: relative error <= 1e-5."""
    module, x_BTD = _module_and_input(build)
    full = module(x_BTD)
    half = TOKENS // 2
    for split in ([TOKENS], [half] + [1] * half, [5, 1, 7, 2, TOKENS - 15], [1] * TOKENS):
        cache = _poisoned_cache(module, TOKENS)
        pieces = torch.cat([module(piece, cache) for piece in x_BTD.split(split, dim=1)], dim=1)
        error = relative_error(pieces, full)
        assert error <= 1e-5, f"split {split}: relative error {error:.1e}"
        assert _lengths(cache) == [[TOKENS] * BATCH] * len(cache), f"lengths {_lengths(cache)}"


@torch.no_grad()
def a_static_cache_equals_the_full_forward(build: Build) -> None:
    """The same with fixed shapes and a mask, as compiled decoding uses it; what lies beyond the length is large."""
    module, x_BTD = _module_and_input(build)
    full = module(x_BTD)
    cache = module.new_cache(BATCH, TOKENS, dtype=torch.float32, device="cpu", static=True)
    for layer in cache:
        for buffer in layer.buffers.values():
            buffer.fill_(1e3)
    pieces = torch.cat([module(piece, cache) for piece in x_BTD.split([7] + [1] * (TOKENS - 7), dim=1)], dim=1)
    error = relative_error(pieces, full)
    assert error <= 1e-5, f"relative error {error:.1e}"


@torch.no_grad()
def every_decode_path_gives_the_same(build: Build) -> None:
    """Each path that the variant states, in float64 to 1e-10 and in float32 to 1e-5: prefill, chunks, single tokens."""
    for attention in _layers(build).attentions:
        if attention.decode_paths != ("auto",):
            needed = ("absorbs", "absorbs_up_to", *(("kernel_for", "kernels_lack") * ("absorbed" in attention.decode_paths)))
            lacking = [name for name in needed if not hasattr(attention, name)]
            assert not lacking, f"a class with several decode_paths says which it takes: {', '.join(lacking)} is missing"
    for dtype, bound in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        module, x_BTD = _module_and_input(build)
        module, x_BTD = module.to(dtype), x_BTD.to(dtype)
        full = module(x_BTD)
        for path in dict.fromkeys(path for attention in module.attentions for path in attention.decode_paths):
            for attention in module.attentions:
                attention.decode = path if path in attention.decode_paths else "auto"
            for split in ([TOKENS], [5, 1, 7, TOKENS - 13], [TOKENS - 3, 1, 1, 1]):
                cache = _poisoned_cache(module, TOKENS, dtype)
                pieces = torch.cat([module(piece, cache) for piece in x_BTD.split(split, dim=1)], dim=1)
                error = relative_error(pieces, full)
                assert error <= bound, f"decode={path}, split {split}, {dtype}: relative error {error:.1e}"


@torch.no_grad()
def a_window_hides_what_it_should(build: Build) -> None:
    """Token by token through a ring of 2 sinks and 5 newest equals one call in which a mask hides the rest.

    A state hides nothing: there a window is refused.
    """
    module, x_BTD = _module_and_input(build)
    window, sinks = 5, 2
    if any(states_of(attention, x_BTD.dtype) for attention in module.attentions):
        try:
            _poisoned_cache(module, TOKENS, window=window, sinks=sinks)
        except Refusal as refusal:
            assert f"window={window}" in str(refusal), f"the message does not name the window: {refusal}"
            return
        raise AssertionError("a layer with a state took a window, in which that state does not fit")
    own = [keys_seen(attention, TOKENS) for attention in module.attentions]
    if max(own) <= window:  # the layers' own window is the smaller one and holds
        window, sinks = max(own), 0
    ring = _poisoned_cache(module, TOKENS, window=window, sinks=sinks)
    for layer, reach in zip(ring, own, strict=True):
        wanted = reach if reach <= window else window + sinks
        assert layer.slots == wanted, f"{layer.slots} slots for a window of {window}, {sinks} sinks and the layer's own {reach}"
    singles = torch.cat([module(piece, ring) for piece in x_BTD.split(1, dim=1)], dim=1)
    whole = module(x_BTD, _poisoned_cache(module, TOKENS, window=window, sinks=sinks))
    error = relative_error(singles, whole)
    assert error <= 1e-5, f"relative error {error:.1e} between one token at a time and one call"
    for hidden, query in ((sinks, sinks + window), (TOKENS - window - 1, TOKENS - 1)):
        changed = x_BTD.clone()
        changed[:, hidden] += 1.0
        after = module(changed, _poisoned_cache(module, TOKENS, window=window, sinks=sinks))
        assert torch.equal(after[:, query], whole[:, query]), f"token {query} sees token {hidden} beyond its window"
        assert not torch.equal(after[:, query - 1], whole[:, query - 1]), f"token {query - 1} misses token {hidden}"
    if max(own) > window:
        assert not torch.equal(whole[:, -1], module(x_BTD)[:, -1]), "a window changes nothing"


@torch.no_grad()
def caches_in_few_bits_stay_close(build: Build) -> None:
    """In each format of FEW_BITS one call gives what single tokens give, also with fixed shapes and in padded rows.

    Full precision is within the bound of that format, and something is lost. A format that tells keys from values is refused
    where no layer caches values alone. Of keys by channel enough tokens come for a group.

    To 1e-10; to 1e-6 through states, which are rounded to float32 from one call to the next.
    """
    for name, bound in FEW_BITS.items():
        kept = cache_format(name)
        tokens, half = TOKENS, TOKENS // 2
        if kept.by_channel:
            tokens = min(GROUP + 8, _positions(_layers(build)))
            half = tokens - 6
        module, x_BTD = _module_and_input(build, tokens)
        between = 1e-6 if any(states_of(attention, torch.int8) for attention in module.attentions) else 1e-10
        if not _keeps(module, kept):
            _refused(module, kept)
            continue
        # In float32 the two differ in the last place, which tips an entry halfway between two levels to the other one.
        module, x_BTD = module.to(torch.float64), x_BTD.to(torch.float64)
        whole, full = module(x_BTD, _poisoned_cache(module, tokens, kept)), module(x_BTD)
        error = relative_error(whole, full)
        assert 0 < error <= bound, f"{name}: relative error {error:.1e} against full precision"
        # Of a static cache the slots beyond the length are hidden by a mask, and finite.
        fixed = module.new_cache(BATCH, tokens, dtype=kept, device="cpu", static=True)
        for cache, split in ((_poisoned_cache(module, tokens, kept), [1] * tokens), (fixed, [7, tokens - 10, 1, 1, 1])):
            pieces = torch.cat([module(piece, cache) for piece in x_BTD.split(split, dim=1)], dim=1)
            error = relative_error(pieces, whole)
            assert error <= between, f"{name}, split {split}: relative error {error:.1e} against one call"
        valid_BT = torch.arange(half) < torch.tensor([half, half - 3, 1])[:, None]
        cache = module.new_cache(BATCH, tokens, dtype=kept, device="cpu")
        padded = module(x_BTD[:, :half], cache, valid_BT=valid_BT)
        error = relative_error(padded[valid_BT], whole[:, :half][valid_BT])
        assert error <= between, f"{name}: relative error {error:.1e} of padded rows"
        row = torch.cat((x_BTD[1, : half - 3], x_BTD[1, half : half + 3]))[None]
        alone = module(row, module.new_cache(1, tokens, dtype=kept, device="cpu"))
        steps = torch.cat([module(x_BTD[:, half + i : half + i + 1], cache) for i in range(3)], dim=1)
        error = relative_error(steps[1], alone[0, -3:])
        assert error <= between, f"{name}: relative error {error:.1e} of the tokens after a padded row"


def _positions(module: AttentionLayers) -> int:
    """Tokens that every layer takes."""
    ropes = [rope for each in module.attentions if (rope := getattr(each, "rope", None)) is not None]
    return min((rope.max_seq_len for rope in ropes), default=2 * GROUP)


def _refused(module: AttentionLayers, kept: CacheFormat) -> None:
    try:
        module.new_cache(1, 1, dtype=kept, device="cpu")
    except Refusal as refusal:
        assert f"cache.dtype={kept}" in str(refusal), f"the refusal does not name the format: {refusal}"
    else:
        raise AssertionError(f"{kept} was taken, and no layer caches values alone")


def _keeps(module: AttentionLayers, kept: CacheFormat) -> bool:
    """Whether values can be told from keys, where a format does."""
    return not kept.tells_apart or any(map(value_names, module.attentions))


@torch.no_grad()
def padded_rows_equal_the_rows_alone(build: Build) -> None:
    """A batch of three lengths, padded on the right and on the left, without and with a cache, then decoded on."""
    module, x_BTD = _module_and_input(build)
    prompt, lengths = TOKENS - 4, (TOKENS - 4, 9, 1)
    for left in (False, True):
        valid_BT = torch.zeros(BATCH, prompt, dtype=torch.bool)
        padded = torch.full((BATCH, prompt, x_BTD.shape[2]), 7.0)
        places = [slice(prompt - n, prompt) if left else slice(0, n) for n in lengths]
        for row, (n, place) in enumerate(zip(lengths, places, strict=True)):
            valid_BT[row, place] = True
            padded[row, place] = x_BTD[row, :n]
        cache = module.new_cache(BATCH, TOKENS, dtype=torch.float32, device="cpu")
        plain, cached = module(padded, valid_BT=valid_BT), module(padded, cache, valid_BT=valid_BT)
        steps = [module(x_BTD[:, -4 + i : TOKENS - 3 + i], cache) for i in range(4)]
        for row, (n, place) in enumerate(zip(lengths, places, strict=True)):
            alone = module(torch.cat((x_BTD[row, :n], x_BTD[row, -4:]))[None])[0]
            side = "left" if left else "right"
            for kind, got in (("without cache", plain), ("with cache", cached)):
                error = relative_error(got[row, place], alone[:n])
                assert error <= 1e-5, f"{side} padding {kind}, row of {n}: relative error {error:.1e}"
            error = relative_error(torch.stack([step[row, 0] for step in steps]), alone[n:])
            assert error <= 1e-5, f"{side} padding, tokens after a prompt of {n}: relative error {error:.1e}"


def measured_cache_bytes_equal_the_formula(build: Build) -> None:
    """Bytes read off the buffers are the formula's elements times the element size; in few bits, and their scales.

    What is allocated is the formula at that context: of a window no more than its tokens, of a state the same at any.
    """
    module = _layers(build)
    for index, attention in enumerate(module.attentions):
        for stated, what in ((sixteen_bits_of(attention), "to stay in 16 bits"), (value_names(attention), "to be values")):
            unknown = set(stated) - attention.cache_shapes.keys()
            assert not unknown, f"{_of_layer(module, index)}{sorted(unknown)} are stated {what} and are not cached"
        unknown = set(getattr(attention, "wide_states", ())) - states_of(attention, torch.bfloat16).keys()
        assert not unknown, f"{_of_layer(module, index)}{sorted(unknown)} are stated to be wide and are no states"
    for dtype in map(cache_format, dict.fromkeys((*NAMED, *FEW_BITS))):
        if not _keeps(module, dtype):
            continue
        caches = module.new_cache(2, 8, dtype=dtype, device="cpu")
        for index, (attention, cache) in enumerate(zip(module.attentions, caches, strict=True)):
            where, wanted = f"{_of_layer(module, index)}{dtype}", formula_bytes(attention, dtype)
            assert cache.bytes_per_token == wanted, f"{where}: {cache.bytes_per_token} bytes measured, {wanted} by formula"
            for context in (8, 64):
                longer = new_cache(attention, 2, context, dtype=dtype, device="cpu")
                wanted = 2 * formula_bytes_at(attention, dtype, context)
                assert longer.nbytes == wanted, f"{where}: {longer.nbytes} bytes for 2 x {context} tokens, not {wanted}"


@torch.no_grad()
def a_full_cache_refuses_another_token(build: Build) -> None:
    """One token too many is a Refusal that names both numbers, and nothing is written."""
    module, x_BTD = _module_and_input(build)
    cache = _poisoned_cache(module, TOKENS - 1)
    module(x_BTD[:, 1:], cache)
    try:
        module(x_BTD[:, :1], cache)
    except Refusal as error:
        assert str(TOKENS - 1) in str(error), f"the message does not say how many fit: {error}"
    else:
        raise AssertionError(f"a cache for {TOKENS - 1} tokens took {TOKENS}")
    assert _lengths(cache) == [[TOKENS - 1] * BATCH] * len(cache)


@torch.no_grad()
def rows_do_not_mix(build: Build) -> None:
    """Changing one row of the batch leaves the others bit-equal."""
    module, x_BTD = _module_and_input(build)
    changed = x_BTD.clone()
    changed[1] = changed[1].flip(0)
    before, after = module(x_BTD), module(changed)
    assert torch.equal(before[0], after[0]) and torch.equal(before[2], after[2]), "a row depends on another"
    assert not torch.equal(before[1], after[1]), "the output ignores its input"


def every_parameter_gets_a_gradient(build: Build) -> None:
    """Backward reaches every parameter with finite, non-zero values, but those that the class states as `frozen`."""
    module, x_BTD = _module_and_input(build)
    weight = torch.randn(x_BTD.shape, generator=torch.Generator().manual_seed(2))
    (module(x_BTD) * weight).sum().backward()
    for index, attention in enumerate(module.attentions):
        frozen, where = set(getattr(attention, "frozen", ())), _of_layer(module, index)
        unknown = frozen - dict(attention.named_parameters()).keys()
        assert not unknown, f"{where}{sorted(unknown)} are stated as frozen and are no parameters"
        for name, parameter in attention.named_parameters():
            if name in frozen:
                trained = parameter.requires_grad or parameter.grad is not None
                assert not trained, f"{where}{name} is stated as frozen and is trained"
                continue
            assert parameter.grad is not None, f"{where}{name} gets no gradient"
            assert parameter.grad.isfinite().all(), f"{where}{name} gets a non-finite gradient"
            # A bias on keys shifts all logits of a query alike: softmax removes it, and its gradient is zero by algebra.
            if not (name.endswith(".bias") and name.startswith(("k_", "in_"))):
                assert parameter.grad.abs().max() > 1e-6, f"{where}{name} gets a zero gradient"


@torch.no_grad()
def a_state_dict_brings_the_function_back(build: Build) -> None:
    """A fresh module with the saved values gives bit-equal outputs; tables are not part of it, but for stored frequencies."""
    module, x_BTD = _module_and_input(build)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    parameters = {name for name in state if not name.endswith("_extra_state")}
    named = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    assert parameters == named, f"more than parameters is saved: {sorted(state)}"
    other = _layers(build).eval()
    other.load_state_dict(state)
    assert torch.equal(other(x_BTD), module(x_BTD)), "the loaded module computes something else"


@torch.no_grad()
def it_compiles_without_a_graph_break(build: Build) -> None:
    """torch.compile(fullgraph=True) traces the forward pass and gives the same values."""
    module, x_BTD = _module_and_input(build)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    error = relative_error(compiled(x_BTD), module(x_BTD))
    assert error <= 1e-6, f"relative error {error:.1e}"


@torch.no_grad()
def bfloat16_stays_close_to_float32(build: Build) -> None:
    """The module cast to bfloat16 stays within 3 % of float32, full and through a bfloat16 cache."""
    module, x_BTD = _module_and_input(build)
    full = module(x_BTD)
    low = module.to(torch.bfloat16)
    cache = _poisoned_cache(low, TOKENS, torch.bfloat16)
    x = x_BTD.to(torch.bfloat16)
    pieces = torch.cat([low(piece, cache) for piece in x.split([TOKENS - 3, 1, 1, 1], dim=1)], dim=1)
    for kind, got in (("full", low(x)), ("cached", pieces)):
        assert got.dtype == torch.bfloat16, f"{kind}: output in {got.dtype}"
        error = relative_error(got, full)
        assert error <= 0.03, f"{kind}: relative error {error:.1e}"


@torch.no_grad()
def every_backend_gives_the_same(build: Build) -> None:
    """`sdpa` equals `reference`, with and without a cache; reference's weights are causal and sum to one, less with sinks.

    A layer that attends to no single tokens has no weights.
    """
    module, x_BTD = _module_and_input(build)
    module.set_execution(backend="reference")
    weights: list[Tensor] = []
    reference = module(x_BTD, weights_out=weights)
    weighing = list(filter(attends, module.attentions))
    assert len(weights) == len(weighing), f"{len(weights)} weights of {len(weighing)} layers that attend"
    for attention, weights_BHTS in zip(weighing, weights, strict=True):
        shape = (BATCH, attention.n_heads, TOKENS, TOKENS)
        assert weights_BHTS.shape == shape, f"weights of shape {tuple(weights_BHTS.shape)}"
        sums_BHT = weights_BHTS.sum(dim=-1)
        if getattr(attention, "sink_logits", None) is None:
            assert torch.allclose(sums_BHT, torch.ones(()), atol=1e-5), "weights do not sum to one"
        else:
            assert sums_BHT.min() > 0 and sums_BHT.max() < 1, "a sink takes no share of the weights"
        assert weights_BHTS.triu(1).abs().max() == 0, "a weight reaches into the future"
    module.set_execution(backend="sdpa")
    cache = _poisoned_cache(module, TOKENS)
    pieces = torch.cat([module(piece, cache) for piece in x_BTD.split([TOKENS - 5, 4, 1], dim=1)], dim=1)
    for kind, got in (("full", module(x_BTD)), ("cached", pieces)):
        error = relative_error(got, reference)
        assert error <= 1e-5, f"{kind}: relative error {error:.1e}"


CHECKS: tuple[Callable[[Build], None], ...] = (
    output_has_the_inputs_shape_and_dtype,
    no_token_sees_the_future,
    cached_decoding_equals_the_full_forward,
    a_static_cache_equals_the_full_forward,
    every_decode_path_gives_the_same,
    a_window_hides_what_it_should,
    caches_in_few_bits_stay_close,
    padded_rows_equal_the_rows_alone,
    measured_cache_bytes_equal_the_formula,
    a_full_cache_refuses_another_token,
    rows_do_not_mix,
    every_parameter_gets_a_gradient,
    a_state_dict_brings_the_function_back,
    it_compiles_without_a_graph_break,
    bfloat16_stays_close_to_float32,
    every_backend_gives_the_same,
)
