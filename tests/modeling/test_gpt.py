"""The GPT around a variant: shapes, vocabulary, initial values, positions, dropout, decoding through its caches."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.errors import UserError
from modeling.attention import attends
from modeling.attention.contract import randomise, relative_error
from modeling.attention.layer_cache import new_cache
from modeling.attention.layers import AttentionLayers
from modeling.gpt import GPT, MLP
from modeling.kernels.attend import attend
from tests.support.variants import KNOBS, SHIPPED, deep_enough, gpt_from

VOCAB, PADDED, D = 100, 128, 48
LEARNED = [["attention=mha_learned"], ["attention=mla_plain"], KNOBS["gqa, learned positions"][0]]


def random_tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def seeded(overrides: list[str], **changes: Any) -> GPT:
    """A model whose initial values are the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return gpt_from(overrides, **changes)


def gradients(model: GPT, tokens: Tensor) -> tuple[float, dict[str, Tensor]]:
    """The loss and every parameter's gradient, dropout drawn from one seed."""
    model.zero_grad()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# --- shapes and losses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", SHIPPED)
def test_tokens_go_in_and_float32_logits_and_nats_come_out(variant: str) -> None:
    model = seeded([f"attention={variant}"])
    tokens = random_tokens(3, 17)
    logits, nats = model(tokens), model.token_losses(tokens[:, :-1], tokens[:, 1:])
    loss = model.loss(tokens[:, :-1], tokens[:, 1:])
    assert logits.shape == (3, 17, PADDED) and logits.dtype == torch.float32
    assert model.hidden(tokens).shape == (3, 17, D)
    assert nats.shape == (3, 16) and nats.dtype == torch.float32 and not nats.requires_grad
    assert loss.shape == () and loss.requires_grad
    assert loss.item() == pytest.approx(nats.mean().item(), rel=1e-6)


def test_a_bfloat16_model_still_gives_float32_logits() -> None:
    model = randomise(seeded(["attention=mla"]))
    wanted = model(random_tokens(2, 9))
    got = model.to(torch.bfloat16)(random_tokens(2, 9))
    assert got.dtype == torch.float32
    assert relative_error(got[..., :VOCAB], wanted[..., :VOCAB]) < 0.05


def test_the_same_seed_gives_the_same_model_and_another_seed_another() -> None:
    torch.manual_seed(3)
    first = gpt_from(["attention=mla"]).state_dict()
    other = gpt_from(["attention=mla"]).state_dict()
    torch.manual_seed(3)
    again = gpt_from(["attention=mla"]).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["embedding.weight"], other["embedding.weight"])


@pytest.mark.parametrize(("variant", "chunk"), [("mha", None), ("mla_plain", 10)])
def test_the_loss_compiles_without_a_graph_break(variant: str, chunk: int | None) -> None:
    model, tokens = randomise(seeded([f"attention={variant}"], n_layers=1)), random_tokens(2, 13)
    model.loss_chunk_tokens = chunk
    wanted, wanted_gradients = gradients(model, tokens)
    torch._dynamo.reset()
    model.loss = torch.compile(model.loss, backend="eager", fullgraph=True)
    loss, got_gradients = gradients(model, tokens)
    assert loss == pytest.approx(wanted, rel=1e-6)
    for name, gradient in wanted_gradients.items():
        assert relative_error(got_gradients[name], gradient) < 1e-6, name


@pytest.mark.parametrize("variant", SHIPPED)
def test_both_backends_give_the_same_logits(variant: str) -> None:
    model = randomise(seeded([f"attention={variant}"]))
    tokens = random_tokens(2, 20)
    model.set_execution(backend="reference")
    reference = model(tokens)[..., :VOCAB]
    model.set_execution(backend="sdpa")
    assert [attention.backend for attention in model.attentions] == ["sdpa"] * len(model.blocks)
    assert relative_error(model(tokens)[..., :VOCAB], reference) < 1e-5


def test_a_model_that_is_not_causal_sees_both_sides_and_has_no_cache() -> None:
    model = randomise(seeded(["attention=mla"], causal=False))
    tokens = random_tokens(1, 9)
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % VOCAB
    assert relative_error(model(changed)[:, 0, :VOCAB], model(tokens)[:, 0, :VOCAB]) > 1e-3
    with pytest.raises(ValueError, match="a cache needs causal attention"):
        model.new_cache(1, 8, dtype=torch.float32, device="cpu")


# --- the padded vocabulary -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("vocab_size", "padded"), [(1, 64), (64, 64), (65, 128), (100, 128), (128, 128)])
def test_the_vocabulary_is_padded_to_a_multiple_of_64(vocab_size: int, padded: int) -> None:
    model = gpt_from(["attention=mha"], vocab_size)
    logits = model(torch.zeros(1, 3, dtype=torch.long))
    assert model.head.weight.shape == model.embedding.weight.shape == (padded, D)
    assert logits.shape == (1, 3, padded)
    assert logits[..., :vocab_size].isfinite().all()
    assert (logits[..., vocab_size:] == float("-inf")).all()


@pytest.mark.parametrize("chunk", [None, 7])
def test_the_loss_is_the_one_of_the_unpadded_vocabulary(chunk: int | None) -> None:
    model = randomise(seeded(["attention=mha"], tie_embeddings=False))
    model.loss_chunk_tokens = chunk
    tokens = random_tokens(3, 12)
    with torch.no_grad():
        logits = model.hidden(tokens[:, :-1]) @ model.head.weight[:VOCAB].T
        wanted = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(3, 11)
    loss, grads = gradients(model, tokens)
    assert loss == pytest.approx(wanted.mean().item(), rel=1e-6)
    assert relative_error(model.token_losses(tokens[:, :-1], tokens[:, 1:]), wanted) < 1e-6
    assert grads["head.weight"][VOCAB:].abs().max() == 0
    assert grads["head.weight"][:VOCAB].abs().amax(dim=1).min() > 0


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("vocab_size", [64, 100])
def test_a_uniform_model_loses_the_logarithm_of_the_unpadded_vocabulary(vocab_size: int, chunk: int | None) -> None:
    model = gpt_from(["attention=mha"], vocab_size)
    nn.init.zeros_(model.head.weight)  # the embedding too: they are tied
    model.loss_chunk_tokens = chunk
    tokens = random_tokens(2, 12) % vocab_size
    exact = torch.tensor(math.log(vocab_size)).item()
    assert model.loss(tokens[:, :-1], tokens[:, 1:]).item() == pytest.approx(exact, rel=2e-7)
    assert model.token_losses(tokens[:, :-1], tokens[:, 1:]).unique().tolist() == pytest.approx([exact], rel=2e-7)


@pytest.mark.parametrize("variant", ["mha", "mla"])
def test_a_chunked_loss_gives_every_parameter_the_same_gradient(variant: str) -> None:
    model, tokens = randomise(seeded([f"attention={variant}"])), random_tokens(3, 12)
    loss, wanted = gradients(model, tokens)
    model.loss_chunk_tokens = 10
    chunked_loss, got = gradients(model, tokens)
    assert chunked_loss == pytest.approx(loss, rel=1e-6)
    assert got.keys() == wanted.keys() == dict(model.named_parameters()).keys()
    for name in wanted:
        assert relative_error(got[name], wanted[name]) < 1e-5, name


# --- the table of initial values -------------------------------------------------------------------------------------

WIDE = [
    "model.d_model=192",
    "model.head_dim=48",
    "model.mlp_hidden=512",
    "model.n_layers=3",
    "model.bias=true",
    "model.tie_embeddings=false",
]
WIDE_LAYERS, STD = 3, 0.03


def is_output(name: str) -> bool:
    return name.endswith(("o_proj.weight", "down_proj.weight")) and "kv_down" not in name and "q_down" not in name


@pytest.mark.parametrize("zero_outputs", [False, True], ids=["", "zero outputs"])
@pytest.mark.parametrize("init", ["normal", "fan_in", "xavier"])
@pytest.mark.parametrize(
    "attention", [["attention=mha_learned"], ["attention=mla", "attention.q_lora_rank=80"]], ids=["mha_learned", "mla"]
)
def test_initial_values_are_those_of_the_table(attention: list[str], init: str, zero_outputs: bool) -> None:
    model = seeded([*attention, *WIDE], init=init, init_std=STD, zero_init_outputs=zero_outputs)
    outputs = 0
    for name, parameter in model.named_parameters():
        values = parameter.detach().double()
        if name.endswith("bias"):
            assert values.abs().max() == 0, name
        elif values.ndim == 1:
            assert (values == 1).all(), name
        elif is_output(name) and zero_outputs:
            assert values.abs().max() == 0, name
        else:
            depth = (2 * WIDE_LAYERS) ** -0.5 if is_output(name) else 1.0
            uniform = init == "xavier" and "embedding" not in name and name != "head.weight"
            wanted = (2 / sum(values.shape)) ** 0.5 * depth if uniform else STD * depth
            if init == "fan_in" and "embedding" not in name and name != "head.weight":
                wanted *= (192 / values.shape[1]) ** 0.5
            # Five standard errors of a standard deviation; uniform values scatter less than normal ones.
            assert values.std().item() == pytest.approx(wanted, rel=5 / (2 * values.numel()) ** 0.5), name
            assert abs(values.mean().item()) < 5 * wanted / values.numel() ** 0.5, name
            furthest = values.abs().max().item() / wanted
            assert 1.6 < furthest <= 3**0.5 + 1e-6 if uniform else furthest > 3, name
        outputs += is_output(name)
    assert outputs == 2 * WIDE_LAYERS


@pytest.mark.parametrize("latent", ["joint", "split"])
@pytest.mark.parametrize(("norm", "scale"), [("rms", False), ("rms", True), ("none", False), ("none", True)])
def test_up_projected_keys_and_values_have_the_stated_variance(norm: str, scale: bool, latent: str) -> None:
    """L s^2 with a norm on the latent, D L s^4 without one; latent_scale makes D of the L; MHA's is D s^2."""
    size, rank = 192, 96 if latent == "joint" else 48  # what one up-projection reads
    overrides = [f"attention.latent_norm={norm}", f"attention.latent_scale={str(scale).lower()}"]
    overrides.append(f"attention.kv_latent={latent}")
    attention = seeded(["attention=mla", *WIDE, *overrides], init_std=STD).attentions[0]
    x = torch.randn(1, 400, size, generator=torch.Generator().manual_seed(0))
    cache = new_cache(attention, 1, 400, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        for start in range(0, 400, 50):
            attention(x[:, start : start + 50], cache, positions_BT=torch.arange(50)[None])
        latents = cache.buffers["latent"]
        variances = [
            attention.k_up_proj(latents[..., :rank]).var().item(),
            attention.v_up_proj(latents[..., -rank:]).var().item(),
        ]
    assert latents.shape[-1] == 96
    stated = (size if scale else rank) * STD**2 * (1 if norm == "rms" else size * STD**2)
    assert variances == pytest.approx([stated, stated], rel=0.1)


RANKS = {
    "mla": ["kv_lora_rank=32"],
    "mla_plain": ["kv_lora_rank=32"],
    "mla_frozen": ["kv_lora_rank=32"],
    "mla_slice": ["kv_lora_rank=32"],
    "mla_shared_latent": ["kv_lora_rank=32"],
    "mla_deepseek": ["kv_lora_rank=32", "q_lora_rank=24"],
    "gla": ["kv_lora_rank=64"],
    "mfa": ["q_lora_rank=24"],
    "tpa": ["q_rank=1", "k_rank=4", "v_rank=1"],
}
STARTS = {name: [f"attention={name}"] for name in SHIPPED} | {
    f"{name}, {', '.join(ranks)}": [f"attention={name}", *(f"attention.{rank}" for rank in ranks)]
    for name, ranks in RANKS.items()
}
STARTS["mla, no norm, scaled"] = ["attention=mla", "attention.latent_norm=none", "attention.latent_scale=true"]
STARTS["mla, split, no norm, a query rank"] = ["attention=mla", "attention.kv_latent=split", "attention.latent_norm=none"]
STARTS["mla, split, no norm, a query rank"] += ["attention.q_lora_rank=24"]
NORMED = {"tied_kv": 1.0, "shared_kv": 1.0}  # by a norm behind the projection


@pytest.mark.parametrize("start", STARTS)
def test_fan_in_starts_queries_keys_and_values_alike_in_every_variant_at_any_rank(
    start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D s^2, MHA's, in all layers that attend and in each part of a key."""
    model = seeded([*WIDE, *deep_enough(STARTS[start]), *STARTS[start]], init="fan_in", init_std=STD)
    seen: list[tuple[torch.Tensor, ...]] = []

    def noting(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Any:
        seen.append((q, k, v))
        return attend(q, k, v, **options)

    monkeypatch.setattr("modeling.attention.output.attend", noting)
    x = torch.randn(7, 60, 192, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        AttentionLayers(model.attentions)(x / x.square().mean(dim=-1, keepdim=True).sqrt())
    assert len(seen) == sum(map(attends, model.attentions))
    wanted = NORMED.get(start.partition(",")[0], 192 * STD**2)
    for number, (q, k, v) in enumerate(seen):
        own = v.shape[-1]  # behind it a key has its rotated part
        parts = {"values": v, "keys": k[..., :own], "rotated keys": k[..., own:], "queries": q[..., :own]}
        if start.startswith(("tied_kv", "shared_kv")):
            del parts["queries"]  # whose norm has a gain of its own, or none
        for part, values in parts.items():
            if values.numel():
                assert values.square().mean().item() == pytest.approx(wanted, rel=0.15), f"{part} of layer {number}"


def test_keys_of_mha_have_the_stated_variance() -> None:
    attention = seeded(["attention=mha_learned", *WIDE], init_std=STD).attentions[0]
    x = torch.randn(1, 400, 192, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert attention.k_proj(x).var().item() == pytest.approx(192 * STD**2, rel=0.1)


# --- head, positions, MLP, biases ------------------------------------------------------------------------------------


def test_a_tied_head_is_the_embedding_and_an_untied_one_is_not() -> None:
    tied, untied = seeded(["attention=mha"], tie_embeddings=True), seeded(["attention=mha"], tie_embeddings=False)
    assert tied.head.weight is tied.embedding.weight
    assert copy.deepcopy(tied).head.weight is not tied.head.weight
    assert relative_error(untied.head.weight, untied.embedding.weight) > 1
    counts = [sum(p.numel() for p in model.parameters()) for model in (tied, untied)]
    assert counts[1] - counts[0] == PADDED * D
    _, grads = gradients(untied, random_tokens(2, 5))
    unused = sorted(set(range(VOCAB)) - set(random_tokens(2, 5)[:, :-1].flatten().tolist()))
    assert grads["embedding.weight"][unused].abs().max() == 0
    _, grads = gradients(tied, random_tokens(2, 5))
    assert grads["embedding.weight"][unused].abs().amax(dim=1).min() > 0


@pytest.mark.parametrize(
    "overrides", [*([f"attention={name}"] for name in SHIPPED), *(k[0] for k in KNOBS.values())], ids=[*SHIPPED, *KNOBS]
)
def test_a_table_of_positions_exists_exactly_for_learned_positions(overrides: list[str]) -> None:
    model = gpt_from(overrides)
    attention = model.attentions[0]
    assert (model.position_embedding is not None) == (attention.positions == "learned")
    assert not (attention.has_positions and attention.positions == "learned")
    if model.position_embedding is not None:
        assert model.position_embedding.weight.shape == (64, D)


@pytest.mark.parametrize("overrides", LEARNED, ids=["mha", "mla", "gqa"])
def test_learned_positions_are_the_rows_of_the_table(overrides: list[str]) -> None:
    """positions_BT picks rows; a table turned by five rows does the same to positions five further on."""
    model, tokens = randomise(seeded(overrides)), random_tokens(2, 12)
    plain = model(tokens)[..., :VOCAB]
    positions = torch.arange(12).expand(2, -1)
    assert torch.equal(model(tokens, positions_BT=positions)[..., :VOCAB], plain)
    assert relative_error(model(tokens, positions_BT=positions + 5)[..., :VOCAB], plain) > 0.1
    assert model.position_embedding is not None
    with torch.no_grad():
        model.position_embedding.weight.copy_(model.position_embedding.weight.roll(5, dims=0))
    assert torch.equal(model(tokens, positions_BT=positions + 5)[..., :VOCAB], plain)


@pytest.mark.parametrize("variant", ["mha", "mha_decoupled", "mla"])
def test_rotated_positions_count_by_their_distance(variant: str) -> None:
    model, tokens = randomise(seeded([f"attention={variant}"])), random_tokens(2, 12)
    plain = model(tokens)[..., :VOCAB]
    positions = torch.arange(12).expand(2, -1)
    assert relative_error(model(tokens, positions_BT=positions)[..., :VOCAB], plain) < 1e-6
    assert relative_error(model(tokens, positions_BT=positions + 30)[..., :VOCAB], plain) < 1e-4
    assert relative_error(model(tokens, positions_BT=positions * 3)[..., :VOCAB], plain) > 1e-2


def test_without_positions_the_order_of_earlier_tokens_does_not_matter() -> None:
    model, tokens = randomise(seeded(KNOBS["mha, no positions"][0], n_layers=1)), random_tokens(1, 12)
    turned = torch.cat((tokens[:, :-1].flip(1), tokens[:, -1:]), dim=1)
    assert relative_error(model(turned)[:, -1, :VOCAB], model(tokens)[:, -1, :VOCAB]) < 1e-5
    rotated = randomise(seeded(["attention=mha"], n_layers=1))
    assert relative_error(rotated(turned)[:, -1, :VOCAB], rotated(tokens)[:, -1, :VOCAB]) > 1e-2


@pytest.mark.parametrize(("kind", "matrices"), [("swiglu", 3), ("relu2", 2)])
def test_an_mlp_is_its_equation(kind: str, matrices: int) -> None:
    mlp = randomise(MLP(d_model=6, hidden=10, kind=kind, bias=True)).double()
    x = torch.randn(2, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    up = x @ mlp.up_proj.weight.T + mlp.up_proj.bias
    if kind == "swiglu":
        gate = x @ mlp.gate_proj.weight.T + mlp.gate_proj.bias
        inner = gate / (1 + (-gate).exp()) * up
    else:
        inner = torch.where(up > 0, up, 0) ** 2
    wanted = inner @ mlp.down_proj.weight.T + mlp.down_proj.bias
    assert relative_error(mlp(x), wanted) < 1e-12
    assert sum(p.ndim == 2 for p in mlp.parameters()) == matrices


def test_the_whole_model_runs_with_either_mlp() -> None:
    for kind in ("swiglu", "relu2"):
        model = randomise(seeded(["attention=mla"], mlp=kind))
        _, grads = gradients(model, random_tokens(2, 9))
        assert all(grad.abs().max() > 0 for grad in grads.values())


@pytest.mark.parametrize("variant", SHIPPED)
def test_biases_stand_on_all_projections_or_on_none(variant: str) -> None:
    """But never on the head nor, as in DeepSeek's models, on up-projections of a latent, nor where dt_bias stands for one."""
    without, biased = gpt_from([f"attention={variant}"], bias=False), gpt_from([f"attention={variant}"], bias=True)
    assert not any(name.endswith(".bias") for name, _ in without.named_parameters())
    for name, module in biased.named_modules():
        if isinstance(module, nn.Linear):
            bare = name == "head" or re.search(r"attention\.([qkv]_up|decay)_proj$", name)
            assert (module.bias is None) == bool(bare or not module.weight.requires_grad), name


# --- dropout and activation checkpointing ----------------------------------------------------------------------------


def test_dropout_acts_in_training_only() -> None:
    with_dropout, without = seeded(["attention=mla", "model.dropout=0.5"]), seeded(["attention=mla"])
    tokens = random_tokens(2, 12)
    assert with_dropout.attentions[0].dropout == 0.5
    with_dropout.train()
    assert not torch.equal(with_dropout(tokens), with_dropout(tokens))
    with_dropout.eval()
    assert torch.equal(with_dropout(tokens), without(tokens))


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("variant", ["mha", "mla"])
def test_dropout_on_attention_weights_alone_acts_in_training_only(variant: str, backend: str) -> None:
    model = randomise(seeded([f"attention={variant}", "attention.dropout=0.5"]))
    model.set_execution(backend=backend)
    tokens = random_tokens(2, 12)
    assert model.dropout.p == 0
    model.train()
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize("variant", SHIPPED)
def test_activation_checkpointing_changes_neither_loss_nor_gradients(variant: str) -> None:
    plain = seeded([f"attention={variant}"], dropout=0.2)
    checkpointed = seeded([f"attention={variant}"], dropout=0.2, activation_checkpointing=True)
    tokens = random_tokens(2, 12)
    (loss, grads), (loss_again, grads_again) = gradients(plain, tokens), gradients(checkpointed, tokens)
    assert loss == loss_again
    assert all(torch.equal(grads[name], grads_again[name]) for name in grads)


def test_activation_checkpointing_keeps_less_for_the_backward_pass() -> None:
    def saved_bytes(model: GPT) -> int:
        kept: dict[int, int] = {}

        def remember(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        tokens = random_tokens(2, 40)
        with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
            loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        assert loss.requires_grad
        return sum(kept.values())

    plain = saved_bytes(seeded(["attention=mla"]))
    checkpointed = saved_bytes(seeded(["attention=mla"], activation_checkpointing=True))
    assert checkpointed < plain / 2


# --- decoding through the caches of all layers -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides", [*([f"attention={name}"] for name in SHIPPED), LEARNED[2]], ids=[*SHIPPED, "gqa, learned"]
)
@torch.no_grad()
def test_cached_decoding_equals_the_full_forward(overrides: list[str]) -> None:
    model, tokens = randomise(seeded(overrides)).eval(), random_tokens(2, 20)
    full = model(tokens)[..., :VOCAB]
    for static in (False, True):
        for split in ([20], [9] + [1] * 11, [3, 1, 7, 2, 7]):
            cache = model.new_cache(2, 20, dtype=torch.float32, device="cpu", static=static)
            assert len(cache) == len(model.blocks)
            pieces = torch.cat([model(piece, cache) for piece in tokens.split(split, dim=1)], dim=1)
            assert relative_error(pieces[..., :VOCAB], full) <= 1e-5, (static, split)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "overrides", [*([f"attention={name}"] for name in SHIPPED), LEARNED[2]], ids=[*SHIPPED, "gqa, learned"]
)
@torch.no_grad()
def test_rows_of_a_padded_batch_equal_the_rows_alone(overrides: list[str], side: str) -> None:
    """Without a cache, with one, with one of fixed shapes; then two tokens more for every row."""
    model, tokens = randomise(seeded(overrides)).eval(), random_tokens(3, 14)
    lengths, prompt = (12, 5, 1), 12
    valid, padded = torch.zeros(3, prompt, dtype=torch.bool), torch.full((3, prompt), VOCAB - 1)
    places = [slice(prompt - n, prompt) if side == "left" else slice(0, n) for n in lengths]
    for row, (n, place) in enumerate(zip(lengths, places, strict=True)):
        valid[row, place] = True
        padded[row, place] = tokens[row, :n]
    caches = [model.new_cache(3, 14, dtype=torch.float32, device="cpu", static=static) for static in (False, True)]
    outputs = [model(padded, valid_BT=valid), *(model(padded, cache, valid_BT=valid) for cache in caches)]
    more = [torch.cat([model(tokens[:, t : t + 1], cache) for t in (12, 13)], dim=1) for cache in caches]
    for row, (n, place) in enumerate(zip(lengths, places, strict=True)):
        alone = model(torch.cat((tokens[row, :n], tokens[row, 12:]))[None])[0, :, :VOCAB]
        for kind, out in zip(("without cache", "cache", "static cache"), outputs, strict=True):
            assert relative_error(out[row, place, :VOCAB], alone[:n]) <= 1e-5, f"{kind}, row of {n}"
        for kind, out in zip(("cache", "static cache"), more, strict=True):
            assert relative_error(out[row, :, :VOCAB], alone[n:]) <= 1e-5, f"{kind}, tokens after a prompt of {n}"


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init": "orthogonal"}, "init=orthogonal is unknown; choose normal, fan_in or xavier"),
        ({"mlp": "gelu"}, "mlp=gelu is unknown; choose swiglu or relu2"),
    ],
)
def test_a_choice_that_does_not_exist_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^model=tiny attention=mha: {re.escape(message)}$"):
        gpt_from(["attention=mha"], **changes)


@pytest.mark.parametrize(("variant", "kind"), [("mha_learned", "positions"), ("mha", "positions")])
def test_tokens_beyond_the_last_position_are_refused_with_both_numbers(variant: str, kind: str) -> None:
    model = seeded([f"attention={variant}"])
    assert model(random_tokens(1, 64)).isfinite()[..., :VOCAB].all()
    with pytest.raises(ValueError, match=f"position 64 is beyond the 64 {kind} of this model"):
        model(random_tokens(1, 65))
    cache = model.new_cache(1, 80, dtype=torch.float32, device="cpu")
    model(random_tokens(1, 60), cache)
    with pytest.raises(ValueError, match=f"position 66 is beyond the 64 {kind} of this model"):
        model(random_tokens(1, 7), cache)


@pytest.mark.parametrize("variant", SHIPPED)
def test_a_full_cache_refuses_a_token_and_says_how_many_it_holds(variant: str) -> None:
    model = seeded([f"attention={variant}"])
    cache = model.new_cache(2, 10, dtype=torch.float32, device="cpu")
    model(random_tokens(2, 8), cache)
    with pytest.raises(ValueError, match="the cache holds 10 tokens a row and 8 are taken: 3 more do not fit"):
        model(random_tokens(2, 3), cache)
    assert model(random_tokens(2, 2), cache).shape == (2, 2, PADDED)
    assert [layer.lengths_B.tolist() for layer in cache] == [[10, 10]] * len(cache)
