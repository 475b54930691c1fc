"""Keys by channel (KIVI, arXiv 2402.02750): against the paper's own steps, and whatever way tokens come in."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.evaluation.cache_size import measure_cache
from modeling.attention.cache import Cache, Placement
from modeling.attention.contract import randomise, relative_error
from modeling.attention.layer_cache import formula_bytes, formula_bytes_at, new_cache
from modeling.attention.quantisation import cache_format
from modeling.generation import generate
from modeling.gpt import GPT
from tests.support.variants import attention_from, gpt_from

ROWS, TOKENS, GROUP = 3, 75, 32
SHAPES: dict[str, tuple[int, ...]] = {"k": (2, 5), "v": (2, 7), "k_rope": (4,)}
SPLITS = {
    "one call": [TOKENS],
    "one by one": [1] * TOKENS,
    "around a group's end": [31, 1, 1, 1, 41],
    "behind it": [33, 1, 30, 11],
    "two groups at once": [5, 70],
    "groups whole": [64, 1, 9, 1],
}
# What a query at t sees of the position p, beside p <= t.
WINDOWS: dict[str, tuple[dict[str, int], Callable[[int, int], bool]]] = {
    "no window": ({}, lambda t, p: True),
    "within a group": ({"window": 9}, lambda t, p: t - p < 9),
    "a group": ({"window": 32}, lambda t, p: t - p < 32),
    "more than one": ({"window": 33}, lambda t, p: t - p < 33),
    "with sinks": ({"window": 20, "sinks": 3}, lambda t, p: t - p < 20 or p < 3),
    "with sinks of more than a group": ({"window": 5, "sinks": 35}, lambda t, p: t - p < 5 or p < 35),
    "longer than the text": ({"window": 70, "sinks": 33}, lambda t, p: True),
    "the layer's own": ({"reach": 16}, lambda t, p: t - p < 16),
    "the layer's own, the smaller one": ({"reach": 16, "window": 40, "sinks": 2}, lambda t, p: t - p < 16),
    "the layer's own, the larger one": (
        {"reach": 50, "window": 20, "sinks": 4},
        lambda t, p: t - p < 20 or (p < 4 and t - p < 50),
    ),
}


def four_bits(x_N: list[float]) -> list[float]:
    """Numbers that share a scale: the largest is -8 of them, the others whole ones from -8 to 7."""
    largest = max(x_N, key=abs)
    scale = float(torch.tensor(largest / -8).bfloat16())
    return [scale * min(7, max(-8, round(x / scale))) for x in x_N]


def eight_bits(x_N: list[float]) -> list[float]:
    scale = float((torch.tensor(max(map(abs, x_N))).float() / 127 * (1 + 2**-7)).bfloat16())
    return [scale * min(127, max(-127, round(x / scale))) for x in x_N]


def keys_seen(k_TGK: Tensor, position: int, bits: int) -> Tensor:
    """What the query at that position sees, channel by channel: groups of 32 that are complete, the others in 16 bits."""
    one = {4: four_bits, 8: eight_bits}[bits]
    seen = k_TGK[: position + 1].bfloat16().double()
    for group in range((position + 1) // GROUP):
        part = slice(group * GROUP, (group + 1) * GROUP)
        for head in range(seen.shape[1]):
            for channel in range(seen.shape[2]):
                seen[part, head, channel] = torch.tensor(one(seen[part, head, channel].tolist()), dtype=torch.float64)
    return seen


@functools.cache
def tokens_of_the_text() -> dict[str, Tensor]:
    new = {name: noise(1, TOKENS, *shape) for name, shape in SHAPES.items()}
    new["k"][..., 3] *= 40  # a channel that stands out
    return new


@functools.cache
def keys_of_the_text(bits: int) -> list[Tensor]:
    """What the query at each position sees."""
    return [keys_seen(tokens_of_the_text()["k"][0], position, bits) for position in range(TOKENS)]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cache_of(name: str = "kc4v4", rows: int = 1, slots: int = TOKENS, **options: Any) -> Cache:
    return Cache(
        rows, slots, SHAPES, dtype=cache_format(name), device="cpu", values=("v",), sixteen_bits=("k_rope",), **options
    )


def poisoned(cache: Cache) -> Cache:
    for tensor in cache.growing():
        if tensor.is_floating_point():
            tensor.fill_(float("nan"))
    return cache


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("bits", [4, 8])
def test_every_query_sees_what_the_paper_leaves_it_however_tokens_come(bits: int, split: str) -> None:
    everything_seen_is_right(bits, split, "no window", static=False)


@pytest.mark.parametrize("static", [False, True], ids=["eager", "static"])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("window", list(WINDOWS)[1:])
def test_through_a_window_a_query_sees_the_same_keys_and_no_others(window: str, split: str, static: bool) -> None:
    everything_seen_is_right(4, split, window, static=static)


def everything_seen_is_right(bits: int, split: str, window: str, *, static: bool) -> None:
    """Against the paper's steps written out, query by query; of a cache that is not static every unwritten number is NaN."""
    new = tokens_of_the_text()
    options, sees = WINDOWS[window]
    cache, first = cache_of(f"kc{bits}v8", static=static, **options), 0
    if not static:
        poisoned(cache)
    values = Cache(1, TOKENS, SHAPES, dtype=cache_format("int8"), device="cpu").append(**new)["v"]
    for tokens in SPLITS[split]:
        place = cache.place(tokens, None)
        seen = cache.append(**{name: tensor[:, first : first + tokens] for name, tensor in new.items()})
        for t in range(tokens):
            position = first + t
            known = torch.tensor([p for p in range(position + 1) if sees(position, p)])
            visible = torch.ones(seen["k"].shape[1], dtype=torch.bool) if place.mask_BTS is None else place.mask_BTS[0, t]
            assert place.mask_BTS is not None or (tokens == 1 and seen["k"].shape[1] == len(known))
            slots = (
                torch.arange(len(visible))[visible] if place.key_positions_BS is None else place.key_positions_BS[0, visible]
            )
            assert sorted(slots.tolist()) == known.tolist(), "every key once"
            assert torch.allclose(seen["k"][0, visible], keys_of_the_text(bits)[position][slots], rtol=1e-12, atol=0)
            assert torch.equal(seen["v"][0, visible], values[0, slots])
            assert torch.equal(seen["k_rope"][0, visible], new["k_rope"][0, slots].bfloat16())
        first += tokens
        assert all(tensor.isfinite().all() for tensor in seen.values()), (
            "a slot beyond the length, or an unfinished group, is read"
        )


def test_a_channel_that_stands_out_costs_the_others_nothing() -> None:
    k, v = noise(1, GROUP + 1, 2, 40), noise(1, GROUP + 1, 1)
    k[..., 3] *= 40
    errors = {}
    for name in ("kc4v4", "int4"):
        cache = Cache(1, GROUP + 1, {"k": (2, 40), "v": (1,)}, dtype=cache_format(name), device="cpu", values=("v",))
        for part in (slice(0, GROUP), slice(GROUP, None)):
            seen = cache.append(k=k[:, part], v=v[:, part])["k"]
        errors[name] = (seen - k)[:, :GROUP, :, 4:32].norm().item()
    assert 0 < errors["kc4v4"] < 0.3 * errors["int4"]


@pytest.mark.parametrize("static", [False, True], ids=["eager", "static"])
@pytest.mark.parametrize("window", WINDOWS)
def test_rows_of_unlike_lengths_complete_their_groups_each_at_its_own_time(window: str, static: bool) -> None:
    """Against every row alone, one token at a time: padded on either side, rows that stop, groups complete within a call."""
    new = {name: noise(ROWS, 150, *shape) for name, shape in SHAPES.items()}
    options, sees = WINDOWS[window]
    cache = cache_of(rows=ROWS, slots=150, static=static, **options)
    alone = [cache_of(slots=150, **options) for _ in range(ROWS)]
    taken = [0] * ROWS
    lengths = ((40, 7, 0), (1, 1, 1), (1, 0, 1), (30, 35, 1), (1, 1, 0), (1, 1, 30), (1, 1, 1), (1, 1, 1), (1, 20, 1))
    for call, counts in enumerate(lengths):
        T = max(counts)
        valid_BT = torch.zeros(ROWS, T, dtype=torch.bool)
        given = {name: torch.full((ROWS, T, *shape), 7.0, dtype=torch.float64) for name, shape in SHAPES.items()}
        for row, count in enumerate(counts):
            place = slice(0, count) if call % 2 else slice(T - count, T)
            valid_BT[row, place] = True
            for name, tensor in new.items():
                given[name][row, place] = tensor[row, taken[row] : taken[row] + count]
        place_now = cache.place(T, valid_BT)
        seen = cache.append(valid_BT, **given)
        assert place_now.mask_BTS is not None
        for row in range(ROWS):
            for t in valid_BT[row].nonzero()[:, 0].tolist():
                one = {name: tensor[row : row + 1, taken[row] : taken[row] + 1] for name, tensor in new.items()}
                by_itself = alone[row].place(1, None)
                latest = alone[row].append(**one)
                taken[row] += 1
                known = [p for p in range(taken[row]) if sees(taken[row] - 1, p)]
                columns = [
                    by_position(place_now, place_now.mask_BTS[row, t], row),
                    by_position(by_itself, None if by_itself.mask_BTS is None else by_itself.mask_BTS[0, 0], 0),
                ]
                assert [sorted(each) for each in columns] == [known, known]
                together, apart = ([each[p] for p in known] for each in columns)
                for name, tensor in latest.items():
                    assert torch.equal(seen[name][row, together], tensor[0, apart]), (call, row, t, name)
    assert cache.lengths_B.tolist() == taken and min(taken) > GROUP and len({n // GROUP for n in taken}) > 1


def by_position(place: Placement, visible_S: Tensor | None, row: int) -> dict[int, int]:
    """Which column holds each position that a query sees; without a mask all that there are, up to this test's length."""
    if place.key_positions_BS is None:
        columns = range(150) if visible_S is None else visible_S.nonzero()[:, 0].tolist()
        return {column: column for column in columns if visible_S is not None or column <= place.start}
    positions = place.key_positions_BS.expand(ROWS, -1)[row]
    columns = range(len(positions)) if visible_S is None else visible_S.nonzero()[:, 0].tolist()
    found = {int(positions[column]): column for column in columns}
    assert len(found) == len(columns), "a key is seen twice"
    return found


@pytest.mark.parametrize(("taken", "back"), [(31, 1), (32, 1), (32, 32), (33, 1), (45, 13), (64, 5)])
def test_tokens_that_are_taken_back_come_again_as_if_for_the_first_time(taken: int, back: int) -> None:
    """A group that they had completed is unfinished again, and its keys are seen as they came."""
    new = {name: noise(1, TOKENS, *shape) for name, shape in SHAPES.items()}
    again, once = cache_of(), cache_of()
    for cache, tokens in ((again, taken), (once, taken - back)):
        for position in range(tokens):
            cache.append(**{name: tensor[:, position : position + 1] for name, tensor in new.items()})
    again.take_back(back)
    assert again.lengths_B.tolist() == once.lengths_B.tolist() == [taken - back]
    for position in range(taken - back, taken + 3):
        other = {name: -tensor[:, position : position + 1] for name, tensor in new.items()}
        seen = [cache.append(**other) for cache in (again, once)]
        assert all(torch.equal(seen[0][name], seen[1][name]) for name in SHAPES), position


VARIANTS = {
    "gqa": ["attention=gqa"],
    "a shared rotated key": ["attention=mha_decoupled"],
    "learned positions": ["attention=mha_learned"],
    "layers that read others": ["attention=gqa_cla"],
    "sinks": ["attention=gqa", "attention.sink_logits=true"],
    "tensor products": ["attention=tpa"],
    "tensor products expanded": ["attention=tpa", "attention.decode=expand"],
    "windows": ["attention=swa_3_1"],
    "windows and sink logits": ["attention=swa_sinks", "attention.kinds.local.window=33"],
    "layers that read others, within windows": [
        "attention=gqa",
        "attention.layers=[own,reader]",
        "attention.kinds={own:{window:9},reader:{window:9,reads:own}}",
    ],
}


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_a_model_gives_the_same_in_one_call_in_chunks_and_with_fixed_shapes(variant: str) -> None:
    model: GPT = randomise(gpt_from(VARIANTS[variant])).eval().double()
    tokens, kept = torch.randint(100, (2, 64), generator=torch.Generator().manual_seed(0)), cache_format("kc4v8")
    whole = model(tokens, model.new_cache(2, 64, dtype=kept, device="cpu"))[..., :100]
    assert relative_error(whole, model(tokens)[..., :100]) > 1e-4
    for static, split in ((False, [30, *[1] * 34]), (False, [13, 51]), (True, [5, 25, *[1] * 34]), (True, [40, 24])):
        cache = model.new_cache(2, 64, dtype=kept, device="cpu", static=static)
        pieces = torch.cat([model(piece, cache) for piece in tokens.split(split, dim=1)], dim=1)[..., :100]
        assert relative_error(pieces, whole) <= 1e-6, (static, split)


@pytest.mark.parametrize("window", [None, 9])
@torch.no_grad()
def test_a_step_is_compiled_once_and_completes_groups_as_an_eager_one_does(window: int | None) -> None:
    model: GPT = randomise(gpt_from(["attention=gqa"], n_layers=1)).eval().double()
    tokens, kept = torch.randint(100, (2, 36), generator=torch.Generator().manual_seed(0)), cache_format("kc4v8")
    whole = model(tokens, model.new_cache(2, 36, dtype=kept, device="cpu", window=window))[..., :100]
    cache = model.new_cache(2, 36, dtype=kept, device="cpu", window=window)
    pieces = [model(tokens[:, :30], cache)]
    for layer in cache:
        layer.make_static()
    torch._dynamo.reset()
    step = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        pieces += [step(token, cache) for token in tokens[:, 30:].split(1, dim=1)]
    assert relative_error(torch.cat(pieces, dim=1)[..., :100], whole) <= 1e-6


@torch.no_grad()
def test_weights_have_one_column_a_token_whichever_version_a_query_sees() -> None:
    for overrides in (VARIANTS["gqa"], VARIANTS["tensor products"], VARIANTS["tensor products expanded"]):
        layer = randomise(attention_from(overrides)).eval().double()
        layer.backend = "reference"
        x_BTD = noise(2, 40, 48)
        found: dict[str, list[Tensor]] = {"whole": [], "steps": []}
        for kind, split in (("whole", [40]), ("steps", [39, 1])):
            cache = new_cache(layer, 2, 40, dtype=cache_format("kc4v4"), device="cpu")
            for piece in x_BTD.split(split, dim=1):
                layer(piece, cache, weights_out=found[kind])
        (whole_BHTS,), (_, last_BHTS) = found["whole"], found["steps"]
        assert whole_BHTS.shape == (2, 4, 40, 40) and whole_BHTS.triu(1).abs().max() == 0
        assert torch.allclose(whole_BHTS.sum(dim=-1), torch.ones((), dtype=torch.float64))
        assert torch.allclose(whole_BHTS[:, :, -1:], last_BHTS)


def test_a_prompt_is_continued_as_one_token_at_a_time_would() -> None:
    model: GPT = randomise(gpt_from(["attention=gqa"])).eval().double()
    drawn = torch.randint(100, (3, 37), generator=torch.Generator().manual_seed(0)).tolist()
    prompts = [row[:length] for row, length in zip(drawn, (37, 30, 1), strict=True)]
    kept = cache_format("kc4v4")
    together = torch.stack(list(generate(model, prompts, max_new_tokens=20, temperature=0, cache_dtype=kept)), dim=1)
    for row, prompt in enumerate(prompts):
        cache, written = model.new_cache(1, 64, dtype=kept, device="cpu"), list(prompt)
        with torch.no_grad():
            for place in range(len(prompt) + 19):
                logits = model(torch.tensor([[written[place]]]), cache)
                if place + 1 >= len(prompt):
                    written.append(int(logits[0, -1].argmax()))
        assert together[row].tolist() == written[len(prompt) :]


def test_bytes_written_out_by_hand_and_as_measured_at_any_context() -> None:
    """A layer of 2 groups of heads of 12: 24 channels. 32 tokens are 16 bytes and a scale of 2 for each, in int8 32 and 2."""
    layer = attention_from(["attention=gqa"])
    values = {"4": 2 * (6 + 2), "8": 2 * (12 + 2), "16": 2 * 2 * 12}
    for keys, of_group in (("4", 24 * (16 + 2)), ("8", 24 * (32 + 2))):
        for bits, of_value in values.items():
            kept = cache_format(f"kc{keys}v{bits}")
            for context in (1, 31, 32, 33, 64, 100, 1024):
                wanted = context // 32 * of_group + min(context, 32) * 24 * 2 + context * of_value
                cache = new_cache(layer, 3, context, dtype=kept, device="meta")
                assert cache.nbytes == 3 * wanted and formula_bytes_at(layer, kept, context) == wanted
            assert cache.bytes_per_token == formula_bytes(layer, kept) == of_group / 32 + of_value
            assert cache.newest_bytes == 32 * 24 * 2 and cache.elements_per_token == 2 * 24
    assert math.isclose(of_group / 32, 25.5)


def test_bytes_of_a_window_are_those_of_the_groups_that_it_touches() -> None:
    """Heads as above, in kc4v4: 432 bytes a group, 16 the value of a token, 1,536 the newest 32 keys."""
    kept = cache_format("kc4v4")
    for window, groups in ((9, 1), (32, 1), (33, 2), (64, 2)):
        layer = attention_from(["attention=gqa", f"attention.window={window}"])
        for context in (8, 31, 32, 33, 64, 1024):
            wanted = min(context // 32, groups) * 432 + min(context, 32) * 48 + min(context, window) * 16
            assert new_cache(layer, 1, context, dtype=kept, device="meta").nbytes == wanted
            assert formula_bytes_at(layer, kept, context) == wanted
    plain = attention_from(["attention=gqa"])
    for sinks, groups in ((0, 1), (4, 2), (33, 3)):
        cache = new_cache(plain, 1, 1024, dtype=kept, device="meta", window=20, sinks=sinks)
        assert cache.nbytes == groups * 432 + 1536 + (20 + sinks) * 16
    model = gpt_from(["attention=swa_3_1"])
    size = measure_cache(model, dtype=kept)
    assert size.bytes_at_context == 3 * (432 + 1536 + 16 * 16) + 2 * 432 + 1536 + 64 * 16
    assert size.bytes_by_context[1024] == 3 * (432 + 1536 + 16 * 16) + 32 * 432 + 1536 + 1024 * 16


@pytest.mark.parametrize(
    ("variant", "name", "sentence"),
    [
        ("mla", "kc4v4", r"^cache.dtype=kc4v4 keeps keys by channel, and what this variant caches .* take cache.dtype=int4, "),
        ("gta", "kc8v4", r"^cache.dtype=kc8v4 keeps keys by channel, .* take cache.dtype=int8, as its keys are kept$"),
    ],
)
def test_what_cannot_be_kept_by_channel_is_refused_in_a_sentence(variant: str, name: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        gpt_from([f"attention={variant}"]).new_cache(1, 4, dtype=cache_format(name), device="cpu")


def test_a_layer_without_values_beside_others_that_have_them_keeps_its_latents_by_vector() -> None:
    kept, int4 = cache_format("kc4v8"), cache_format("int4").keys
    assert (
        kept.storage("latent", sixteen_bits=(), values=()) == int4 and kept.storage("k", sixteen_bits=(), values=("v",)) != int4
    )
    assert kept.storage("v", sixteen_bits=(), values=("v",)) == cache_format("int8").values


@torch.no_grad()
def test_a_model_decodes_through_a_window_what_one_call_gives() -> None:
    model: GPT = randomise(gpt_from(["attention=gqa"])).eval().double()
    tokens, kept = torch.randint(100, (2, 64), generator=torch.Generator().manual_seed(0)), cache_format("kc4v8")
    options: dict[str, Any] = {"dtype": kept, "device": "cpu", "window": 9, "sinks": 2}
    whole = model(tokens, model.new_cache(2, 64, **options))[..., :100]
    assert relative_error(whole, model(tokens, model.new_cache(2, 64, **options | {"dtype": torch.float64}))[..., :100]) < 0.2
    for static, split in ((False, [1] * 64), (False, [13, 51]), (True, [40, *[1] * 24])):
        cache = model.new_cache(2, 64, static=static, **options)
        pieces = torch.cat([model(piece, cache) for piece in tokens.split(split, dim=1)], dim=1)[..., :100]
        assert relative_error(pieces, whole) <= 1e-6, (static, split)


@pytest.mark.parametrize(
    ("length", "window", "sinks"), [(64, 60, 4), (64, 31, 33), (64, 64, 0), (128, 60, 4), (100, 96, 4), (50, 40, 4)]
)
def test_tokens_come_without_end_or_are_refused_where_a_group_has_no_place(length: int, window: int, sinks: int) -> None:
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(1, 200, 1, 4, generator=generator) for _ in range(2))

    def fresh(slots: int) -> Cache:
        shapes = {"k": (1, 4), "v": (1, 4)}
        return Cache(1, slots, shapes, dtype=cache_format("kc8v8"), device="cpu", values=("v",), window=window, sinks=sinks)

    short, ample = fresh(length), fresh(300)
    fits = -(-sinks // GROUP) - (-window // GROUP) <= length // GROUP
    for t in range(200):
        if t == length and not fits:
            with pytest.raises(ValueError, match=f"holds {length} tokens a row and {length} are taken"):
                short.place(1, None)
            return
        seen = []
        for cache in (short, ample):
            placed = cache.place(1, None)
            shown = cache.append(k=keys[:, t : t + 1], v=values[:, t : t + 1])
            positions = placed.key_positions_BS[0]
            may = torch.ones(len(positions), dtype=torch.bool) if placed.mask_BTS is None else placed.mask_BTS[0, 0]
            seen.append({int(at): shown["k"][0, place] for place, at in enumerate(positions.tolist()) if may[place]})
        assert seen[0].keys() == seen[1].keys()
        assert all(torch.equal(seen[0][at], seen[1][at]) for at in seen[0])
