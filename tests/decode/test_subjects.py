"""What decoding is measured on: its sizes, the peer that caches keys and values expanded, and what fits into memory."""

from __future__ import annotations

import pytest
import torch

from harness.decode.subjects import (
    ExpandedAttention,
    Footprint,
    bytes_in_a_step,
    filled_cache,
    footprint,
    in_groups,
    paths_of,
    plan_cells,
    weight_bytes,
)
from modeling.attention import hands_on
from modeling.attention.contract import randomise, relative_error
from modeling.attention.layers import AttentionLayers
from tests.support.allocated import most_allocated
from tests.support.decoding import plan, subject
from tests.support.variants import SHIPPED, attention_from, gpt_from


def test_the_largest_batch_is_what_fits_beside_the_weights() -> None:
    assert Footprint(1000, lambda context: 10 * context).largest_batch(8, 1000 + 3 * 80) == 3
    assert Footprint(1000, lambda context: 10 * context).largest_batch(8, 1000 + 3 * 80 - 1) == 2
    assert Footprint(1000, lambda context: 10 * context).largest_batch(8, 999) == 0


@pytest.mark.parametrize(("attention", "elements"), [("mha", 2 * 4 * 12), ("gqa", 2 * 2 * 12), ("mla", 24 + 6)])
def test_a_footprint_is_counted_on_the_meta_device(attention: str, elements: int) -> None:
    with torch.device("meta"):
        model = gpt_from([f"attention={attention}"])
    sizes = footprint(model, dtype=torch.bfloat16, cache_dtype=torch.float32)
    assert sizes.parameter_bytes == 2 * sum(p.numel() for p in model.parameters())
    assert [sizes.cache_bytes(context) for context in (1, 50)] == [4 * 2 * elements, 50 * 4 * 2 * elements]


def test_a_footprint_holds_no_more_of_a_window_than_its_tokens() -> None:
    sizes = footprint(gpt_from(["attention=swa_1_1"]), dtype=torch.float32, cache_dtype=torch.bfloat16)
    assert [sizes.cache_bytes(context) for context in (8, 64, 4096)] == [
        2 * 48 * (min(context, 16) + context) for context in (8, 64, 4096)
    ]


def test_a_step_reads_every_weight_but_the_tables_that_give_it_rows() -> None:
    tied, own_head = gpt_from(["attention=mha"]), gpt_from(["attention=mha", "model.tie_embeddings=false"])
    learned = gpt_from(["attention=mha_learned"])
    assert weight_bytes(tied) == 4 * sum(p.numel() for p in tied.parameters())
    assert weight_bytes(own_head) == weight_bytes(tied)  # a head of its own, and an embedding that is not read whole
    assert weight_bytes(learned) == weight_bytes(tied)
    assert weight_bytes(tied.to(torch.bfloat16)) == weight_bytes(own_head) / 2


@pytest.mark.parametrize("pad_values", [False, True])
@pytest.mark.parametrize(
    "overrides",
    [
        ["attention=mla"],
        ["attention=mla", "attention.v_head_dim=20"],
        ["attention=mla_plain"],
        ["attention=mla", "attention.q_lora_rank=20", "attention.latent_scale=true"],
        ["attention=mla", "attention.n_kv_heads=2"],
    ],
)
def test_the_expanded_cache_gives_the_same_outputs(overrides: list[str], pad_values: bool) -> None:
    mla = randomise(attention_from(overrides)).eval()
    assert ExpandedAttention.fits(mla)
    parts = [AttentionLayers([mla]), AttentionLayers([ExpandedAttention(mla, pad_values=pad_values)])]
    caches = [part.new_cache(2, 24, dtype=torch.float32, device="cpu") for part in parts]
    x_BTD = torch.randn(2, 20, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for piece in x_BTD.split([12, 1, 1, 6], dim=1):
            theirs, ours = (part(piece, cache) for part, cache in zip(parts, caches, strict=True))
            assert relative_error(ours, theirs) < 1e-5
    v_width = max(mla.qk_width, mla.v_head_dim) if pad_values else mla.v_head_dim
    expanded = mla.n_kv_heads * (mla.qk_width + v_width)
    assert caches[1][0].elements_per_token == expanded > caches[0][0].elements_per_token


def test_only_the_papers_mla_has_an_expanded_cache() -> None:
    fitting = [name for name in SHIPPED if ExpandedAttention.fits(attention_from([f"attention={name}"]))]
    assert fitting == ["mla", "mla_deepseek", "mla_plain", "mla_wide"]
    for change in ("fused_down_projections=true", "kv_latent=split", "latent_norm_place=up_projected", "sink_logits=true"):
        assert not ExpandedAttention.fits(attention_from(["attention=mla", f"attention.{change}"])), change


@pytest.mark.parametrize("attention", SHIPPED)
def test_attention_alone_is_the_sum_of_a_models_attentions(attention: str) -> None:
    model = gpt_from([f"attention={attention}"]).eval()
    part = AttentionLayers(model.attentions)
    x_BTD = torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(0))
    wanted, shared = torch.zeros_like(x_BTD), []
    with torch.no_grad():
        for layer, cache in zip(model.attentions, model.new_cache(2, 9, dtype=torch.float32, device="cpu"), strict=True):
            more = {"shared": shared} if hands_on(layer) else {}
            wanted += layer(x_BTD, cache, **more)
        assert torch.equal(part(x_BTD, part.new_cache(2, 9, dtype=torch.float32, device="cpu")), wanted)


def test_paths_are_those_that_a_variant_has() -> None:
    mla, late = (
        attention_from(["attention=mla"]),
        attention_from(["attention=mla_plain", "attention.positions=rope_after_up"]),
    )
    assert paths_of(mla, "both") == ("expand", "absorbed") and paths_of(mla, "auto") == ("auto",)
    assert paths_of(late, "both") == ("expand",) and paths_of(late, "absorbed") == ()
    assert paths_of(attention_from(["attention=gqa"]), "absorbed") == ("auto",)


@pytest.mark.parametrize("attention", SHIPPED)
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.int8])
def test_a_filled_cache_holds_the_context_and_has_room(attention: str, cache_dtype: torch.dtype) -> None:
    part, p = gpt_from([f"attention={attention}"]), plan(cache_dtype=cache_dtype)
    for cache in filled_cache(part, 2, 16, p, torch.Generator().manual_seed(0)):
        assert cache.lengths_B.tolist() == [16, 16] and cache.max_seq_len == 16 + p.room
        for buffer in cache.buffers.values():
            assert buffer[:, :16].float().std() > 0.5 and not buffer[:, 16:].any()


def test_neighbours_are_timed_together_as_far_as_they_fit() -> None:
    a, b, c, d = (subject("mha", layers=1) for _ in range(4))
    assert in_groups([(a, 4), (b, 5), (c, 10), (d, 3)], 10) == ((a, b), (c,), (d,))


def test_what_does_not_fit_is_skipped_by_name_and_path() -> None:
    p = plan(contexts=(16, 20_000, 100_000), budget_bytes=2**23, prefill_tokens=0, batch_sizes=(1,))
    cells = plan_cells([subject("mqa", layers=1), subject("mla", layers=1)], p)
    fitting = [[(s.name, s.paths) for group in cell.groups for s in group] for cell in cells]
    assert fitting == [[("mqa", ("auto",)), ("mla", ("expand", "absorbed"))], [("mqa", ("auto",)), ("mla", ("absorbed",))], []]
    assert [[s.row for s in cell.skipped] for cell in cells] == [[], ["mla expand"], ["mqa", "mla expand", "mla absorbed"]]
    assert all("takes about" in s.reason for cell in cells for s in cell.skipped)


@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)]
)
@pytest.mark.parametrize(
    ("overrides", "path"),
    [(["attention=tpa"], "absorbed"), (["attention=tpa", "attention.k_rank=4"], "absorbed"), (["attention=mla"], "absorbed")],
)
@torch.no_grad()
def test_the_estimate_of_a_steps_memory_is_what_is_allocated(
    overrides: list[str], path: str, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    dtype, cache_dtype = dtypes
    part = AttentionLayers([attention_from([*overrides, "model.max_seq_len=4096"])]).eval().to(dtype)
    part.set_execution(decode=path)
    for T in (1, 8):
        p = plan(dtype=dtype, cache_dtype=cache_dtype, queries=(T,), prefill_tokens=0)
        cache = filled_cache(part, 2, 3000, p, torch.Generator().manual_seed(0))
        x_BTD = torch.randn(2, T, 48).to(dtype)
        measured = most_allocated(lambda x=x_BTD, cache=cache: part(x, cache)) / (2 * 3000)
        estimated = bytes_in_a_step(part.attentions[0], path, T, p)
        assert 0.85 < estimated / measured < 1.15, f"{T} queries: {estimated:.0f} bytes a cached token, {measured:.0f} measured"
