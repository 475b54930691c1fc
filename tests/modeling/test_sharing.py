"""Sharing across layers, of weights and of latents: what is one, what is cached, and that nothing else changes."""

from __future__ import annotations

import pytest
import torch

from harness.evaluation.cache_size import measure_cache
from modeling.attention.contract import randomise, relative_error
from modeling.flops import parameters_by_block, training_flops_per_token
from modeling.gpt import GPT
from tests.support.reading import check_decoding
from tests.support.variants import gpt_from

L, P, D = 24, 6, 48  # at the tests' sizes


def model_of(sharing: str, every: int, n_layers: int = 4, **changes: object) -> GPT:
    overrides = [f"attention=mla_shared_{sharing}", f"attention.sharing_layers={every}"]
    model: GPT = randomise(gpt_from(overrides, n_layers=n_layers, **changes))
    return model


@pytest.mark.parametrize(("every", "n_layers", "leaders"), [(2, 4, 2), (4, 4, 1), (3, 4, 2), (2, 5, 3)])
def test_shared_latents_divide_the_cache_and_shared_weights_do_not(every: int, n_layers: int, leaders: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        one_layer = (L + P) * dtype.itemsize
        weights = measure_cache(model_of("weights", every, n_layers), dtype=dtype)
        latent = measure_cache(model_of("latent", every, n_layers), dtype=dtype)
        assert weights.bytes_per_token == n_layers * one_layer
        assert latent.bytes_per_token == leaders * one_layer
        assert latent.elements_per_token_by_layer == tuple(L + P if i % every == 0 else 0 for i in range(n_layers))


def test_parameters_fall_by_what_is_shared() -> None:
    alone = parameters_by_block(gpt_from(["attention=mla"], n_layers=4))["total"]
    followers = 2
    assert parameters_by_block(model_of("weights", 2))["total"] == alone - followers * D * (L + P)
    assert parameters_by_block(model_of("latent", 2))["total"] == alone - followers * (D * (L + P) + L)


def test_layers_of_a_group_have_one_down_projection_and_those_of_another_group_another() -> None:
    first, second, third, _ = model_of("weights", 2).attentions
    assert second.kv_down_proj is first.kv_down_proj and second.k_rope_proj is first.k_rope_proj
    assert third.kv_down_proj is not first.kv_down_proj
    assert second.k_up_proj is not first.k_up_proj and second.latent_norms is not first.latent_norms


def test_shared_weights_compute_what_equal_weights_compute() -> None:
    shared, apart = model_of("weights", 2).eval(), randomise(gpt_from(["attention=mla"], n_layers=4)).eval()
    apart.load_state_dict(shared.state_dict())  # a shared matrix stands under both its names
    tokens = torch.randint(100, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(shared(tokens), apart(tokens))


@torch.no_grad()
def test_a_layer_that_reads_latents_sees_its_leaders_input_and_not_its_own() -> None:
    """Written out: layer 1's keys and values come from layer 0's normed input, its queries from its own."""
    model = model_of("latent", 2, n_layers=2).double().eval()
    tokens = torch.randint(100, (1, 9), generator=torch.Generator().manual_seed(0))
    x = model.embedding(tokens)
    first, second = model.blocks
    h = first.attention_norm(x)
    x = x + first.attention(h)
    x = x + first.mlp(first.mlp_norm(x))
    alone = gpt_from(["attention=mla"], n_layers=1).double().attentions[0]  # layer 1 with layer 0's down-projections
    own = second.attention.state_dict()
    leaders = {k: v for k, v in first.attention.state_dict().items() if k not in own}
    alone.load_state_dict(own | leaders)
    q_nope, q_rope = alone._queries(alone._query_input(second.attention_norm(x)))
    _, latent, k_rope = alone._project_down(h)
    k, v = alone._expand(latent)
    from modeling.attention.rope import rotate

    tables = alone.rope.tables(0, 9, None)
    k = torch.cat((k, rotate(k_rope.unsqueeze(2), tables).expand(-1, -1, 4, -1)), dim=-1)
    q = torch.cat((q_nope, rotate(q_rope, tables)), dim=-1)
    logits = torch.einsum("bthk,bshk->bhts", q, k) * alone.scale
    weights = logits.masked_fill(torch.ones(9, 9, dtype=torch.bool).triu(1), float("-inf")).softmax(-1)
    wanted = alone.o_proj(torch.einsum("bhts,bshv->bthv", weights, v).flatten(2))
    got = second.attention(second.attention_norm(x), shared=[latent, rotate(k_rope.unsqueeze(2), tables).squeeze(2)])
    assert relative_error(got, wanted) < 1e-12
    x = x + wanted
    x = x + second.mlp(second.mlp_norm(x))
    full = torch.nn.functional.linear(model.norm(x), model.head.weight)[..., :100]
    assert relative_error(model(tokens)[..., :100], full) < 1e-6  # logits are float32


@pytest.mark.parametrize("sharing", ["weights", "latent"])
@torch.no_grad()
def test_cached_decoding_equals_the_full_forward_also_in_padded_batches(sharing: str) -> None:
    check_decoding(model_of(sharing, 3, n_layers=4).eval())


@pytest.mark.parametrize("sharing", ["weights", "latent"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_parameter_learns_also_when_activations_are_recomputed(sharing: str, checkpointing: bool) -> None:
    model = model_of(sharing, 2, activation_checkpointing=checkpointing).train()
    plain = model_of(sharing, 2).train()
    tokens = torch.randint(100, (2, 13), generator=torch.Generator().manual_seed(0))
    for each in (model, plain):
        each.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None and ours.grad.abs().max() > 0, name
        assert torch.equal(ours.grad, theirs.grad), name


@pytest.mark.parametrize("sharing", ["weights", "latent"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_loss_compiles(sharing: str, checkpointing: bool) -> None:
    model = model_of(sharing, 2, activation_checkpointing=checkpointing).train()
    tokens = torch.randint(100, (2, 13), generator=torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    compiled = torch.compile(model.loss, backend="eager", fullgraph=True)
    assert relative_error(compiled(tokens[:, :-1], tokens[:, 1:]), model.loss(tokens[:, :-1], tokens[:, 1:])) < 1e-6


def test_a_shared_matrix_counts_in_each_layer_that_multiplies_by_it() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    for sharing in ("weights", "latent"):
        model = model_of(sharing, 2).train()
        model.set_execution(backend="reference")
        tokens = torch.randint(100, (2, 65), generator=torch.Generator().manual_seed(0))
        with FlopCounterMode(display=False) as counter:
            model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        assert counter.get_total_flops() == training_flops_per_token(model, 64) * 128


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["attention=mla", "attention.sharing_layers=2"], "sharing=none does not go with sharing_layers=2"),
        (["attention=mla_shared_latent", "attention.sharing_layers=1"], "sharing=latent does not go with sharing_layers=1"),
        (["attention=mla_shared_weights", "attention.fused_down_projections=true"], "set fused_down_projections=false"),
        (
            ["attention=mla_shared_latent", "attention.sharing_layers=9"],
            "sharing_layers=9 groups more layers than the model has",
        ),
        (["attention=mla", "attention.sharing=keys"], "sharing=keys is unknown here; choose none, weights or latent"),
    ],
)
def test_impossible_sharing_is_refused(overrides: list[str], sentence: str) -> None:
    with pytest.raises(Exception, match=sentence):
        gpt_from(overrides)
