"""Layers that differ by `layers:` and `kinds:`: what each is, that the whole keeps the contract, what is refused."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch

from harness.config.build import build_layers, layers_that_differ
from harness.config.compose import load_train_config
from harness.config.identity import setup_hash
from harness.errors import UserError
from harness.evaluation.cache_size import measure_cache
from harness.runs.load import decode_path, pin_execution
from modeling.attention import reads_back, with_most_paths
from modeling.attention.contract import CHECKS, Build, randomise, relative_error
from modeling.attention.gqa import GroupedQueryAttention
from modeling.attention.layers import AttentionLayers
from modeling.attention.mla import MultiheadLatentAttention
from modeling.attention.rope import rotate
from modeling.flops import parameters_by_block, training_flops_per_token
from tests.support.reading import check_decoding
from tests.support.variants import SIZES, config_at, gpt_from

D, H, d = 48, 4, 12  # SIZES
LATENT = (
    "{mechanism:mla,q_lora_rank:null,kv_lora_rank:20,qk_nope_head_dim:12,qk_rope_head_dim:6,positions:decoupled,n_kv_heads:4,"
)
LATENT += (
    "latent:learned,kv_latent:joint,latent_norm:rms,latent_norm_place:latent,latent_scale:false,"
    "fused_down_projections:false,sharing:none,sharing_layers:1}"
)
GROUPED = ["attention=gqa", "attention.layers=[one,two,one]", "attention.kinds={one:{n_kv_heads:1},two:{}}", "model.n_layers=5"]
MIXED = ["attention=gqa", "attention.layers=[grouped,latent]", f"attention.kinds={{grouped:{{}},latent:{LATENT}}}"]
LEARNED = ["attention=gqa", "attention.layers=[none,learned]"]
LEARNED += ["attention.kinds={none:{positions:none},learned:{positions:learned}}"]


@functools.cache
def _prototype(*overrides: str) -> AttentionLayers:
    config = config_at(*overrides)
    return build_layers(config, layers_that_differ(config))


@pytest.mark.parametrize("overrides", [GROUPED, MIXED], ids=["grouped", "mixed"])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check: Callable[[Build], None], overrides: list[str]) -> None:
    check(lambda: copy.deepcopy(_prototype(*overrides)))


def test_a_pattern_is_repeated_and_cut() -> None:
    model = gpt_from(GROUPED)
    assert [attention.n_kv_heads for attention in model.attentions] == [1, 2, 1, 1, 2]
    by_layer = [2 * groups * d for groups in (1, 2, 1, 1, 2)]
    size = measure_cache(model, dtype=torch.bfloat16)
    assert size.elements_per_token_by_layer == tuple(by_layer)
    assert size.bytes_per_token == 2 * sum(by_layer)
    assert parameters_by_block(model)["attention"] == sum(2 * D * H * d + 2 * D * groups * d for groups in (1, 2, 1, 1, 2))


def test_a_kind_of_ones_own_joins_those_of_the_yaml() -> None:
    wide = ["attention=swa_1_1", "attention.layers=[wide,full]", "attention.kinds={wide:{window:7}}"]
    assert [attention.window for attention in gpt_from(wide).attentions] == [7, None]
    gated = gpt_from(["attention=swa_1_1", "attention.kinds.full={gate:head}"])  # what the YAML's own kind does not say
    assert [attention.gate_proj is not None for attention in gated.attentions] == [False, True]


def test_a_kind_of_another_mechanism_keeps_the_options_that_both_have() -> None:
    grouped, latent = gpt_from([*MIXED, "attention.rope_theta=500.0"]).attentions
    assert isinstance(grouped, GroupedQueryAttention) and isinstance(latent, MultiheadLatentAttention)
    assert grouped.rope is not None and latent.rope is not None
    assert grouped.rope.theta == latent.rope.theta == 500.0


def test_layers_that_are_named_alike_are_the_model_without_a_pattern() -> None:
    plain, named = (
        gpt_from(["attention=gqa", *more]) for more in ([], ["attention.layers=[same,same]", "attention.kinds={same:{}}"])
    )
    named.load_state_dict(plain.state_dict())
    tokens = torch.randint(100, (2, 12), generator=torch.Generator().manual_seed(0))
    assert torch.equal(plain(tokens), named(tokens))


def test_a_variant_without_a_pattern_says_nothing_of_patterns() -> None:
    assert not {"layers", "kinds"} & set(config_at("attention=gqa").attention)
    hashes = {setup_hash(config_at(*overrides)) for overrides in (["attention=gqa"], GROUPED[:3], MIXED)}
    assert len(hashes) == 3


@torch.no_grad()
def test_a_mixed_model_decodes_as_it_reads_on_every_path_and_a_path_is_for_the_layers_that_have_it() -> None:
    model = randomise(gpt_from(MIXED)).eval()
    tokens = torch.randint(100, (3, 20), generator=torch.Generator().manual_seed(0))
    full = model(tokens)[..., :100]
    grouped, latent = model.attentions
    assert with_most_paths(model.attentions) is latent
    for decode in ("auto", "expand", "absorbed"):
        model.set_execution(decode=decode)
        assert (grouped.decode, latent.decode) == ("auto", decode)
        for static in (False, True):
            cache = model.new_cache(3, 20, dtype=torch.float32, device="cpu", static=static)
            pieces = [model(piece, cache)[..., :100] for piece in tokens.split([9, 1, 7, 1, 1, 1], dim=1)]
            assert relative_error(torch.cat(pieces, dim=1), full) <= 1e-5
    assert decode_path(model, 1) == "keys and values as they are cached; absorbed (torch kernel)"
    with pytest.raises(ValueError, match=r"attention.decode=wide is not a path of this variant"):
        model.set_execution(decode="wide")
    assert latent.decode == "absorbed"


@pytest.mark.parametrize(
    ("attention", "words"),
    [
        ("gqa", "keys and values as they are cached"),
        ("tied_kv", "values as they are cached, keys rotated when they are read"),
        ("gta", "values as they are cached, keys joined of them and one rotated key"),
        ("shared_kv", "one vector as it is cached, key and value"),
    ],
)
def test_the_one_path_is_said_as_what_is_cached_is_read(attention: str, words: str) -> None:
    assert decode_path(gpt_from([f"attention={attention}"]), 1) == words


def test_each_layer_has_the_kernel_that_fits_it() -> None:
    model = gpt_from(MIXED)
    execution = {"backend": "auto", "decode": "absorbed", "kernel": "torch"}
    assert pin_execution(model, execution, device=torch.device("cpu"), precision=torch.float32) == "sdpa_flash"
    assert [attention.backend for attention in model.attentions] == ["sdpa_flash"] * 2


def test_a_table_of_positions_is_made_if_any_layer_asks_for_one() -> None:
    assert gpt_from(LEARNED).position_embedding is not None
    assert gpt_from(MIXED).position_embedding is None


def test_flops_of_layers_that_differ_are_torchs_count() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    for overrides in (GROUPED, MIXED):
        model = gpt_from(overrides)
        model.set_execution(backend="reference")
        tokens = torch.randint(100, (2, 33), generator=torch.Generator().manual_seed(0))
        with FlopCounterMode(display=False) as counter:
            model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        assert counter.get_total_flops() == training_flops_per_token(model, 32) * 64


REFUSED = {
    "attention.layers=[local,full] attention.kinds={full:{}}": "layers names local, which is not in kinds (full): define it "
    "there, or correct the name",
    "attention.layers=[a,a,a] attention.kinds={a:{}}": "layers names 3 layers and the model has 2: shorten the pattern, or "
    "raise model.n_layers",
    "attention.layers=[] attention.kinds={a:{}}": "layers=[] names no kind: name one for each layer, or a pattern of them, or "
    "leave layers out",
    "attention.layers=[a.b] attention.kinds={a.b:{}}": "attention.kinds has a kind named 'a.b': name it by letters, digits",
    "attention.kinds={a:{}}": "kinds=['a'] are of no use without layers, which says where they stand: add layers",
    "attention.layers=[a] attention.kinds={a:{n_kv_heads:3}}": "n_kv_heads=3 does not divide n_heads=4; choose one of "
    "[1, 2, 4]",
    "attention.layers=[a] attention.kinds={a:{groups:3}}": "attention.kinds.a.groups is not a field of the configuration; "
    "choose from dropout, ",
    "attention.layers=[a] attention.kinds={a:{backend:sdpa}}": "attention.kinds.a.backend is not a field of the configuration",
    "attention.layers=[a] attention.kinds={a:{n_kv_heads:two}}": "attention.kinds.a.n_kv_heads=two must be a whole number",
    "attention.layers=[a] attention.kinds={a:{mechanism:linear}}": "attention.kinds.a.mechanism=linear is unknown; choose from",
    "attention.layers=[a] attention.kinds={a:{mechanism:mla}}": "attention.kinds.a.fused_down_projections is missing, which "
    "mechanism=mla needs; give it a value",
    "attention.layers=a attention.kinds={a:{}}": "attention.layers=a must be a list like [a, b]",
    "attention.layers=[a] attention.kinds={a:{dropout:1.5}}": "attention.dropout=1.5 must be at least 0 and below 1",
}


@pytest.mark.parametrize("line", REFUSED)
def test_an_impossible_pattern_is_refused_in_one_sentence(line: str) -> None:
    with pytest.raises(UserError) as caught:
        build_layers(load_train_config([*SIZES, "attention=gqa", *line.split(" ")]), 1)
    assert REFUSED[line] in str(caught.value)


def test_groups_of_neighbours_that_share_do_not_go_with_a_pattern() -> None:
    pattern = ["attention.layers=[a,b]", "attention.kinds={a:{},b:{kv_lora_rank:10}}"]
    with pytest.raises(UserError, match=r"sharing_layers=2 groups neighbours that are all alike, and layers=\['a', 'b'\]"):
        gpt_from(["attention=mla_shared_latent", *pattern])


# --- layers that read another one's keys and values -------------------------------------------------------------------

GEMMA = [
    "attention=gqa",
    "attention.layers=[local,full,reads_local,reads_full,reads_full]",
    "attention.kinds={local:{window:6},full:{},reads_local:{window:6,reads:local},reads_full:{reads:full}}",
    "model.n_layers=5",
]
LATENTS = ["attention=mla", "attention.layers=[own,reader]", "attention.kinds={own:{},reader:{reads:own}}"]


@pytest.mark.parametrize("overrides", [GEMMA, LATENTS], ids=["last layers read", "latents"])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract_of_layers_that_read(check: Callable[[Build], None], overrides: list[str]) -> None:
    check(lambda: copy.deepcopy(_prototype(*overrides)))


def test_a_layer_reads_the_nearest_earlier_one_of_the_kind_that_it_names_and_caches_nothing() -> None:
    model = gpt_from(GEMMA)
    assert [reads_back(attention) for attention in model.attentions] == [0, 0, 2, 2, 3]
    size = measure_cache(model, dtype=torch.bfloat16)
    assert size.elements_per_token_by_layer == (48, 48, 0, 0, 0)
    assert size.bytes_at_context == 2 * 48 * (6 + 64)
    plain = parameters_by_block(gpt_from(["attention=gqa"], n_layers=5))["attention"]
    assert plain - parameters_by_block(model)["attention"] == 3 * 2 * D * 2 * d


def test_cross_layer_attention_is_the_paper_written_out() -> None:
    """Layer 1's queries, from its own input, over layer 0's keys and values, from layer 0's."""
    model = randomise(gpt_from(["attention=gqa_cla"])).double().eval()
    tokens = torch.randint(100, (1, 9), generator=torch.Generator().manual_seed(0))
    x = model.embedding(tokens)
    first, second = model.blocks
    h = first.attention_norm(x)
    x = x + first.attention(h)
    x = x + first.mlp(first.mlp_norm(x))
    tables = first.attention.rope.tables(0, 9, None)
    k = rotate(first.attention.k_proj(h).unflatten(-1, (2, d)), tables).repeat_interleave(2, dim=2)
    v = first.attention.v_proj(h).unflatten(-1, (2, d)).repeat_interleave(2, dim=2)
    q = rotate(second.attention.q_proj(second.attention_norm(x)).unflatten(-1, (H, d)), tables)
    logits = torch.einsum("bthk,bshk->bhts", q, k) * d**-0.5
    weights = logits.masked_fill(torch.ones(9, 9, dtype=torch.bool).triu(1), float("-inf")).softmax(-1)
    x = x + second.attention.o_proj(torch.einsum("bhts,bshv->bthv", weights, v).flatten(2))
    x = x + second.mlp(second.mlp_norm(x))
    full = torch.nn.functional.linear(model.norm(x), model.head.weight)[..., :100]
    assert relative_error(model(tokens)[..., :100], full) < 1e-6  # logits are float32
    assert "blocks.1.attention.k_proj.weight" not in model.state_dict()


@torch.no_grad()
@pytest.mark.parametrize("overrides", [GEMMA, ["attention=gqa_cla"], LATENTS], ids=["gemma", "cla", "latents"])
def test_layers_that_read_decode_as_they_are_trained_also_in_padded_batches(overrides: list[str]) -> None:
    check_decoding(randomise(gpt_from(overrides)).eval())


@pytest.mark.parametrize("overrides", [GEMMA, ["attention=gqa_cla"]], ids=["gemma", "cla"])
def test_gradients_reach_what_is_read_also_when_activations_are_recomputed_and_the_loss_compiles(overrides: list[str]) -> None:
    tokens = torch.randint(100, (2, 13), generator=torch.Generator().manual_seed(0))
    models = [randomise(gpt_from(overrides, activation_checkpointing=again)).train() for again in (False, True)]
    for model in models:
        model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    for (name, ours), theirs in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert ours.grad is not None and ours.grad.abs().max() > 0, name
        assert theirs.grad is not None and torch.equal(ours.grad, theirs.grad), name
    torch._dynamo.reset()
    compiled = torch.compile(models[0].loss, backend="eager", fullgraph=True)
    plain = models[1].loss(tokens[:, :-1], tokens[:, 1:])
    assert relative_error(compiled(tokens[:, :-1], tokens[:, 1:]), plain) < 1e-6


KINDS = "attention.kinds="
REFUSED_TO_READ = {
    f"attention=gqa attention.layers=[b,a] {KINDS}{{a:{{}},b:{{reads:a}}}}": "layer 0 (b) reads keys and values of kind a, and "
    "layer 1 is the first of that kind: a layer reads an earlier one, so name a before b in layers",
    f"attention=gqa attention.layers=[b,b] {KINDS}{{a:{{}},b:{{reads:a}}}}": "and no layer is of that kind",
    f"attention=gqa attention.layers=[a,b] {KINDS}{{a:{{}},b:{{reads:c}}}}": "kinds.b.reads=c, which is not in kinds (a, b)",
    f"attention=gqa attention.layers=[a,b] {KINDS}{{a:{{}},b:{{reads:b}}}}": "kinds.b.reads=b, which reads another kind's "
    "itself",
    f"attention=gqa attention.layers=[a,b] {KINDS}{{a:{{window:8}},b:{{reads:a}}}}": "a layer of window=None cannot read keys "
    "and values of window=8: make them alike",
    f"attention=gqa attention.layers=[a,b] {KINDS}{{a:{{}},b:{{reads:a,n_kv_heads:1}}}}": "a layer of n_kv_heads=1 cannot read",
    f"attention=mla attention.layers=[a,b] {KINDS}{{a:{{}},b:{{reads:a,kv_lora_rank:10}}}}": "a layer of kv_lora_rank=10 "
    "cannot read latents of kv_lora_rank=24",
    f"attention=mla attention.fused_down_projections=true attention.layers=[a,b] {KINDS}{{a:{{}},b:{{reads:a}}}}": "are never "
    "another layer's",
    f"attention=gta attention.layers=[a,b] {KINDS}{{a:{{}},b:{{reads:a}}}}": "TiedKeyValueAttention cannot read what "
    "TiedKeyValueAttention caches",
}


@pytest.mark.parametrize("line", REFUSED_TO_READ)
def test_what_cannot_be_read_is_refused_in_one_sentence(line: str) -> None:
    with pytest.raises(UserError) as caught:
        build_layers(load_train_config([*SIZES, *line.split(" ")]), 2)
    assert REFUSED_TO_READ[line] in str(caught.value)
