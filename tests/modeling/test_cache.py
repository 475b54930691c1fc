"""The key/value cache: each row's own slots, what is visible, what does not fit, and shapes that never change."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from modeling.attention.cache import Cache, place_without_cache
from modeling.attention.contract import randomise, relative_error
from modeling.attention.quantisation import cache_format
from modeling.generation import decode_step
from modeling.gpt import GPT
from tests.support.variants import SHIPPED_BY_CODE, gpt_from

SHAPES: dict[str, tuple[int, ...]] = {"k": (2, 3), "v": (4,)}
ROWS, SLOTS = 3, 8


def new(static: bool = False, dtype: torch.dtype = torch.float32) -> Cache:
    """An empty cache full of NaN: whatever is read without having been written shows."""
    cache = Cache(ROWS, SLOTS, SHAPES, dtype=dtype, device="cpu", static=static)
    for buffer in cache.buffers.values():
        buffer.fill_(float("nan"))
    return cache


def entries(tokens: int, first: int) -> dict[str, Tensor]:
    """`tokens` new entries a row; the number 100 * row + first + t stands in every element of entry t."""
    number = 100.0 * torch.arange(ROWS)[:, None] + first + torch.arange(tokens)
    return {name: number.view(ROWS, tokens, *(1 for _ in shape)).expand(ROWS, tokens, *shape) for name, shape in SHAPES.items()}


def held(cache: Cache, name: str) -> list[list[float]]:
    """Per row, the number that stands in each slot up to the row's length, the same in all of its elements."""
    rows = [cache.buffers[name][row, :length].flatten(1) for row, length in enumerate(cache.lengths_B.tolist())]
    assert all((slots == slots[:, :1]).all() for slots in rows)
    return [slots[:, 0].tolist() for slots in rows]


def mask(rows: list[str]) -> Tensor:
    """Lines of '1.' as booleans."""
    return torch.tensor([[cell == "1" for cell in row] for row in rows])


# --- rows of one length ----------------------------------------------------------------------------------------------


def test_what_was_appended_is_read_back_in_order() -> None:
    cache = new()
    for tokens, first in ((3, 0), (1, 3), (2, 4)):
        seen = cache.append(**entries(tokens, first))
        assert seen["k"].shape == (ROWS, first + tokens, 2, 3) and seen["v"].shape == (ROWS, first + tokens, 4)
        for name, tensor in seen.items():
            assert torch.equal(tensor, entries(first + tokens, 0)[name])
    assert cache.lengths_B.tolist() == [6, 6, 6]
    assert all(buffer[:, 6:].isnan().all() for buffer in cache.buffers.values())


def test_what_is_read_is_the_buffer_itself_not_a_copy() -> None:
    cache = new()
    seen = cache.append(**entries(2, 0))
    assert all(seen[name].data_ptr() == cache.buffers[name].data_ptr() for name in SHAPES)


def test_entries_are_kept_in_the_dtype_of_the_cache() -> None:
    cache = new(dtype=torch.bfloat16)
    seen = cache.append(**entries(2, 0))
    assert {tensor.dtype for tensor in seen.values()} == {torch.bfloat16}
    ragged = new(dtype=torch.bfloat16)
    seen = ragged.append(torch.ones(ROWS, 2, dtype=torch.bool), **entries(2, 0))
    assert {tensor.dtype for tensor in seen.values()} == {torch.bfloat16}
    assert held(ragged, "v") == [[0, 1], [100, 101], [200, 201]]


def test_bytes_and_elements_are_those_of_the_buffers() -> None:
    for dtype, width in ((torch.float32, 4), (torch.bfloat16, 2)):
        cache = new(dtype=dtype)
        assert cache.elements_per_token == 2 * 3 + 4
        assert cache.bytes_per_token == 10 * width
        assert cache.nbytes == ROWS * SLOTS * 10 * width
        cache.append(**entries(2, 0))
        assert cache.bytes_per_token == 10 * width


def test_a_query_sees_the_tokens_up_to_its_own() -> None:
    cache = new()
    prefill = cache.place(4, None)
    assert (prefill.start, prefill.causal, prefill.mask_BTS, prefill.positions_BT) == (0, True, None, None)
    cache.append(**entries(4, 0))
    single = cache.place(1, None)
    assert (single.start, single.causal, single.mask_BTS) == (4, False, None)
    cache.append(**entries(1, 4))
    chunk = cache.place(3, None)  # aligned to the bottom right, not to the top left
    assert chunk.start == 5 and not chunk.causal and chunk.mask_BTS is not None
    assert torch.equal(chunk.mask_BTS, mask(["111111..", "1111111.", "11111111"])[None])


# --- rows of their own lengths ---------------------------------------------------------------------------------------

RIGHT = ["1111", "11..", "1..."]
LEFT = ["1111", "..11", "...1"]


@pytest.mark.parametrize("static", [False, True], ids=["eager", "static"])
@pytest.mark.parametrize(
    ("pads", "kept"),
    [(RIGHT, ([0, 1, 2, 3], [100, 101], [200])), (LEFT, ([0, 1, 2, 3], [102, 103], [203]))],
    ids=["right", "left"],
)
def test_pads_take_no_slot_and_the_next_tokens_follow_each_rows_own(
    pads: list[str], kept: tuple[list[float], ...], static: bool
) -> None:
    cache = new(static)
    cache.append(mask(pads), **entries(4, 0))
    assert cache.lengths_B.tolist() == [4, 2, 1]
    for name in SHAPES:
        assert held(cache, name) == list(kept)
    cache.append(**entries(1, 50))
    cache.append(mask(["1.", ".1", "11"]), **entries(2, 60))
    assert cache.lengths_B.tolist() == [6, 4, 4]
    more: tuple[list[float], ...] = ([50, 60], [150, 161], [250, 260, 261])
    for name in SHAPES:
        assert held(cache, name) == [row + new_ones for row, new_ones in zip(kept, more, strict=True)]


@pytest.mark.parametrize("static", [False, True], ids=["eager", "static"])
def test_positions_and_visibility_follow_each_rows_own_length(static: bool) -> None:
    cache = new(static)
    padded = cache.place(4, mask(LEFT))
    assert not padded.causal and padded.positions_BT is not None and padded.mask_BTS is not None
    assert padded.positions_BT.tolist() == [[0, 1, 2, 3], [0, 0, 0, 1], [0, 0, 0, 0]]
    cache.append(mask(LEFT), **entries(4, 0))
    after = cache.place(2, None)
    assert after.positions_BT is not None and after.mask_BTS is not None and not after.causal
    assert after.positions_BT.tolist() == [[4, 5], [2, 3], [1, 2]]
    visible = SLOTS if static else 6
    for row, queries in enumerate((["11111", "111111"], ["111", "1111"], ["11", "111"])):
        assert torch.equal(after.mask_BTS[row], mask([query.ljust(visible, ".") for query in queries]))


def test_whole_sequences_see_real_tokens_only_and_pads_see_themselves() -> None:
    plain = place_without_cache(3, None, causal=True)
    assert plain.causal and plain.mask_BTS is None and plain.positions_BT is None
    left = place_without_cache(3, mask([".11"]), causal=True)
    assert left.mask_BTS is not None and left.positions_BT is not None and not left.causal
    assert torch.equal(left.mask_BTS[0], mask(["1..", ".1.", ".11"]))
    assert left.positions_BT.tolist() == [[0, 0, 1]]
    both_ways = place_without_cache(3, mask(["11."]), causal=False)
    assert both_ways.mask_BTS is not None
    assert torch.equal(both_ways.mask_BTS[0], mask(["11.", "11.", "111"]))


# --- what does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ragged", [False, True], ids=["equal rows", "ragged rows"])
def test_tokens_that_do_not_fit_are_refused_and_change_nothing(ragged: bool) -> None:
    cache = new()
    cache.append(mask(RIGHT) if ragged else None, **entries(4, 0))
    buffers = {name: buffer.clone() for name, buffer in cache.buffers.items()}
    lengths = cache.lengths_B.tolist()
    sentence = "the cache holds 8 tokens a row and 4 are taken: 5 more do not fit; allocate a longer cache"
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        cache.place(5, None)
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        cache.append(**entries(5, 4))
    assert cache.lengths_B.tolist() == lengths
    for name, buffer in buffers.items():
        assert torch.equal(cache.buffers[name].nan_to_num(-1), buffer.nan_to_num(-1))
    cache.append(**entries(4, 4))
    assert cache.lengths_B.tolist() == [length + 4 for length in lengths]


def test_entries_of_other_names_are_our_own_mistake() -> None:
    with pytest.raises(AssertionError, match="cache holds"):
        new().append(k=torch.zeros(ROWS, 1, 2, 3))


# --- windows ---------------------------------------------------------------------------------------------------------


def ring(window: int, sinks: int, static: bool = False, longest: int = 100) -> Cache:
    return Cache(ROWS, longest, SHAPES, dtype=torch.float32, device="cpu", static=static, window=window, sinks=sinks)


@pytest.mark.parametrize("static", [False, True], ids=["eager", "static"])
@pytest.mark.parametrize("chunks", [[1] * 20, [20], [3, 9, 1, 7], [13, 1, 1, 1, 4]])
def test_a_window_keeps_the_sinks_and_the_newest_tokens_and_no_more_slots(chunks: list[int], static: bool) -> None:
    window, sinks = 4, 2
    cache, first = ring(window, sinks, static), 0
    for tokens in chunks:
        place = cache.place(tokens, None)
        assert place.key_positions_BS is not None
        seen = cache.append(**entries(tokens, first))["v"][..., 0]
        mask_BTS = place.mask_BTS
        if mask_BTS is None:  # one token a row, which sees all that the slots hold
            assert tokens == 1 and not static and (place.start, seen.shape[1]) == (first, min(first + 1, window + sinks))
            mask_BTS = torch.ones(ROWS, 1, seen.shape[1], dtype=torch.bool)
        else:
            assert place.positions_BT is not None
        for row in range(ROWS):
            for t in range(tokens):
                position = first + t
                visible = mask_BTS[row, t]
                wanted = [p for p in range(position + 1) if p < sinks or position - p < window]
                assert sorted(place.key_positions_BS.expand(ROWS, -1)[row, visible].tolist()) == wanted
                assert sorted(seen[row, visible].tolist()) == [100 * row + p for p in wanted]
        first += tokens
    assert all(buffer.shape[1] == window + sinks for buffer in cache.buffers.values())
    assert sorted(cache.buffers["v"][1, :, 0].tolist()) == [100, 101, 116, 117, 118, 119]
    assert cache.nbytes == ROWS * (window + sinks) * cache.bytes_per_token


@pytest.mark.parametrize("static", [False, True], ids=["eager", "static"])
def test_a_window_follows_each_rows_own_length(static: bool) -> None:
    cache = ring(window=3, sinks=1, static=static)
    valid = mask(["111111", "..1111", "11...."])
    cache.place(6, valid)
    cache.append(valid, **entries(6, 0))
    assert cache.lengths_B.tolist() == [6, 4, 2]
    held_numbers = [sorted(cache.buffers["v"][row, :, 0].tolist()) for row in range(ROWS)]
    assert held_numbers[:2] == [[0, 3, 4, 5], [102, 103, 104, 105]]
    assert cache.buffers["v"][2, :2, 0].tolist() == [200, 201]
    place = cache.place(1, None)
    assert place.positions_BT is not None and place.positions_BT.tolist() == [[6], [4], [2]]
    seen = cache.append(**entries(1, 50))["v"][..., 0]
    assert place.mask_BTS is not None
    visible = [sorted(seen[row, place.mask_BTS[row, 0]].tolist()) for row in range(ROWS)]
    assert visible == [[0, 4, 5, 50], [102, 104, 105, 150], [200, 201, 250]]


IN_PLACE = {  # window, sinks, reach, and the distances and positions that a query sees
    "window": (5, 0, None, lambda query, key: query - key < 5),
    "sinks": (4, 2, None, lambda query, key: query - key < 4 or key < 2),
    "reach": (None, 0, 5, lambda query, key: query - key < 5),
    "sinks beyond the reach": (4, 3, 7, lambda query, key: query - key < 4 or (key < 3 and query - key < 7)),
}


@pytest.mark.parametrize("static", [False, True], ids=["eager", "static"])
@pytest.mark.parametrize("case", IN_PLACE)
def test_single_tokens_meet_a_ring_in_place_while_rows_pause(case: str, static: bool) -> None:
    window, sinks, reach, sees = IN_PLACE[case]
    cache = Cache(ROWS, 30, SHAPES, dtype=torch.float32, device="cpu", static=static, window=window, sinks=sinks, reach=reach)
    cache.append(mask(["111", ".11", "1.."]), **entries(3, 0))
    texts = [[0, 1, 2], [101, 102], [200]]  # the numbers that each row took in
    generator = torch.Generator().manual_seed(0)
    for step in range(3, 21):
        runs = None if step % 5 == 0 else torch.rand(ROWS, 1, generator=generator) < 0.7
        place, seen = cache.place(1, runs), cache.append(runs, **entries(1, step))
        assert place.mask_BTS is not None and place.key_positions_BS is not None
        assert seen["v"].shape[1] <= cache.slots and (not static or seen["v"] is cache.buffers["v"])
        for row, text in enumerate(texts):
            text += [100 * row + step] if runs is None or runs[row] else []
            visible, query = place.mask_BTS[row, 0], len(text) - 1
            wanted = {key: text[key] for key in range(query + 1) if sees(query, key)}
            positions = place.key_positions_BS[row, visible].tolist()
            assert dict(zip(positions, seen["v"][row, visible, 0].tolist(), strict=True)) == wanted
            assert len(positions) == len(wanted)
    assert cache.lengths_B.tolist() == [len(text) for text in texts] and min(map(len, texts)) > 8


def test_a_window_as_long_as_the_cache_is_no_window() -> None:
    cache = ring(window=50, sinks=0, longest=SLOTS)
    assert cache.slots == SLOTS
    cache.append(**entries(SLOTS, 0))
    with pytest.raises(ValueError, match="allocate a longer cache"):
        cache.append(**entries(1, SLOTS))


@pytest.mark.parametrize(("window", "sinks"), [(0, 0), (-1, 0), (4, -1), (None, 3)])
def test_an_impossible_window_is_refused(window: int | None, sinks: int) -> None:
    with pytest.raises(ValueError, match=f"^window={window} and sinks={sinks}: a window holds at least 1 token"):
        Cache(1, 8, SHAPES, dtype=torch.float32, device="cpu", window=window, sinks=sinks)


# --- fixed shapes ----------------------------------------------------------------------------------------------------


def test_a_static_cache_always_shows_whole_buffers_and_a_mask() -> None:
    cache = new(static=True)
    for tokens, first in ((3, 0), (1, 3)):
        place, seen = cache.place(tokens, None), cache.append(**entries(tokens, first))
        assert place.mask_BTS is not None and place.mask_BTS.shape == (ROWS, tokens, SLOTS)
        assert place.mask_BTS.sum(dim=2).tolist() == [list(range(first + 1, first + tokens + 1))] * ROWS
        assert all(seen[name] is cache.buffers[name] for name in SHAPES)
    assert cache.lengths_B.tolist() == [4, 4, 4]
    assert held(cache, "v") == [[row * 100 + t for t in range(4)] for row in range(ROWS)]


@pytest.mark.parametrize("variant", SHIPPED_BY_CODE)
@torch.no_grad()
def test_a_compiled_decode_step_is_compiled_once_however_long_the_context_grows(variant: str) -> None:
    model: GPT = randomise(gpt_from([f"attention={variant}"])).eval()
    tokens = torch.randint(100, (2, 20), generator=torch.Generator().manual_seed(0))
    full = model(tokens)[..., :100]
    cache = model.new_cache(2, 20, dtype=torch.float32, device="cpu", static=True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    step = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    pieces = [model(tokens[:, :9], cache)]
    with torch._dynamo.config.patch(error_on_recompile=True):
        pieces += [step(token, cache) for token in tokens[:, 9:].split(1, dim=1)]
    assert relative_error(torch.cat(pieces, dim=1)[..., :100], full) <= 1e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(
    ("variant", "name"), [("gqa", "k8v4_rotated"), ("mla", "int4_rotated"), ("tpa", "int4"), ("mqa", "fp8")]
)
@torch.no_grad()
def test_a_step_through_few_bits_is_compiled_once_and_gives_what_growing_views_give(variant: str, name: str) -> None:
    model: GPT = randomise(gpt_from([f"attention={variant}"])).eval().double()
    tokens = torch.randint(100, (2, 16), generator=torch.Generator().manual_seed(0))
    fixed, growing = (model.new_cache(2, 16, dtype=cache_format(name), device="cpu", static=static) for static in (True, False))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    step = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    compiled, eager = [model(tokens[:, :9], fixed)], [model(tokens[:, :9], growing)]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for token in tokens[:, 9:].split(1, dim=1):
            compiled.append(step(token, fixed))
            eager.append(model(token, growing))
    assert relative_error(torch.cat(compiled, dim=1)[..., :100], torch.cat(eager, dim=1)[..., :100]) <= 1e-6
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@torch.no_grad()
def test_decoding_with_growing_views_does_recompile() -> None:
    """What the test above would see if a static cache's shapes changed."""
    model: GPT = gpt_from(["attention=mha"], n_layers=1).eval()
    cache = model.new_cache(1, 20, dtype=torch.float32, device="cpu")
    torch._dynamo.reset()
    step = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    with torch._dynamo.config.patch(error_on_recompile=True), pytest.raises(torch._dynamo.exc.RecompileError):
        for _ in range(3):
            step(torch.zeros(1, 1, dtype=torch.long), cache)


# --- positions that the cache or the model does not have ---------------------------------------------------------------

BEYOND = "position 64 is beyond the 64 positions of this model; use at most 64 tokens, or raise model.max_seq_len"
EVERY_SCHEME = {
    "rope": ["attention=mha"],
    "decoupled": ["attention=mla"],
    "decoupled heads": ["attention=mha_decoupled"],
    "learned": ["attention=mha_learned"],
    "after up": ["attention=mla_plain", "attention.positions=rope_after_up"],
}


def one_layer(overrides: list[str]) -> GPT:
    model: GPT = randomise(gpt_from(overrides, n_layers=1)).eval()
    assert model.max_seq_len == 64
    return model


def some(length: int, rows: int = 2) -> Tensor:
    return torch.randint(100, (rows, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("scheme", EVERY_SCHEME)
@torch.no_grad()
def test_positions_that_the_model_does_not_have_are_refused_in_every_form(scheme: str) -> None:
    model = one_layer(EVERY_SCHEME[scheme])
    kinds = {"static": {"static": True}, "window": {"window": 5, "sinks": 1}, "eager": {}}
    for kind, options in kinds.items():
        cache = model.new_cache(2, 100, dtype=torch.float32, device="cpu", **options)
        model(some(63), cache)
        model(some(1), cache)
        lengths = cache[0].lengths_B.tolist()
        with pytest.raises(ValueError, match=f"^{BEYOND}$"):
            model(some(1), cache)
        assert cache[0].lengths_B.tolist() == lengths == [64, 64], kind
    valid = torch.ones(2, 64, dtype=torch.bool)
    valid[0, 9:] = False
    ragged = model.new_cache(2, 100, dtype=torch.float32, device="cpu")
    model(some(64), ragged, valid_BT=valid)
    with pytest.raises(ValueError, match=f"^{BEYOND}$"):
        model(some(1), ragged)
    model(some(1), ragged, valid_BT=torch.tensor([[True], [False]]))  # the shorter row has room
    with pytest.raises(ValueError, match=f"^{BEYOND}$"):
        model(some(65), valid_BT=torch.ones(2, 65, dtype=torch.bool))
    model(some(65), valid_BT=torch.arange(65).expand(2, -1) > 0)
    with pytest.raises(ValueError, match=f"^{BEYOND}$"):
        model(some(3), positions_BT=torch.tensor([[0, 64, 1]]))
    with pytest.raises(ValueError, match=r"^position -1 is below 0, the first of the 64 positions of this model$"):
        model(some(3), positions_BT=torch.tensor([[5, -1, 1]]))
    assert model(some(3), positions_BT=torch.tensor([[5, 63, 0]])).isfinite()[..., :100].all()


@pytest.mark.parametrize("scheme", EVERY_SCHEME)
@torch.no_grad()
def test_a_static_cache_longer_than_the_model_takes_what_fits(scheme: str) -> None:
    model, tokens = one_layer(EVERY_SCHEME[scheme]), some(64)
    cache = model.new_cache(2, 100, dtype=torch.float32, device="cpu", static=True)
    pieces = torch.cat([model(piece, cache) for piece in tokens.split([50, 13, 1], dim=1)], dim=1)
    assert relative_error(pieces[..., :100], model(tokens)[..., :100]) <= 1e-5


@pytest.mark.parametrize("padded", [False, True], ids=["equal rows", "ragged rows"])
def test_a_static_cache_refuses_what_does_not_fit_and_counts_the_real_tokens(padded: bool) -> None:
    cache = new(static=True)
    cache.append(mask(RIGHT) if padded else None, **entries(4, 0))
    for _ in range(3):
        cache.append(mask(["1", ".", "."]) if padded else None, **entries(1, 0))
    sentence = "the cache holds 8 tokens a row and 7 are taken: 2 more do not fit; allocate a longer cache"
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        cache.place(2, None)
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        cache.append(**entries(2, 0))
    assert cache.lengths_B.tolist() == ([7, 2, 1] if padded else [7, 7, 7])
    later = new(static=True)
    for _ in range(9):  # rows that are finished take no room, however often they are asked
        later.append(mask(["."] * 3), **entries(1, 0))
    later.append(**entries(8, 0))
    assert later.lengths_B.tolist() == [8, 8, 8]


@torch.no_grad()
def test_after_compiled_steps_an_ordinary_call_knows_how_long_the_rows_are() -> None:
    model = one_layer(["attention=mha"])
    cache = model.new_cache(2, 20, dtype=torch.float32, device="cpu", static=True)
    torch._dynamo.reset()
    step = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    model(some(15), cache)
    for _ in range(4):
        step(some(1), cache)
    model(some(1), cache)
    with pytest.raises(ValueError, match="the cache holds 20 tokens a row and 20 are taken: 1 more do not fit"):
        model(some(1), cache)


@torch.no_grad()
def test_a_compiled_step_that_does_not_fit_is_refused_by_whoever_drives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.compile", functools.partial(torch.compile, backend="eager"))
    model, running = one_layer(["attention=mha"]), torch.tensor([True, False])
    for slots, sentence in ((12, "the cache holds 12 tokens a row and 12 are taken"), (100, "position 64 is beyond the 64")):
        for given in (None, running):
            torch._dynamo.reset()
            cache = model.new_cache(2, slots, dtype=torch.float32, device="cpu")
            model(some(min(slots, 64) - 2), cache)
            step = decode_step(model, cache, "compile", some(1)[:, 0], given)
            for _ in range(2):
                step(some(1)[:, 0], given)
            with pytest.raises(ValueError, match=sentence):
                step(some(1)[:, 0], given)
            for layer in cache:
                layer.take_back(1)  # as a benchmark does, which decodes one token again
            step(some(1)[:, 0], given)
