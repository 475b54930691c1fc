"""Identities between mechanisms and against independent implementations: cheap oracles of the maths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modeling.attention.contract import Variant, randomise, relative_error
from modeling.attention.layer_cache import new_cache
from modeling.attention.rope import RotaryEmbedding, rotate
from modeling.kernels.attend import attend
from tests.support.variants import attention_from

D, H, d = 48, 4, 12


def double(overrides: list[str]) -> Variant:
    return randomise(attention_from(overrides)).double().eval()


def copy_weights(target: nn.Module, weights: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in weights.items():
            target.get_parameter(name).copy_(value)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 16, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def test_mha_without_rotation_is_torchs_multihead_attention(x: Tensor) -> None:
    ours = double(["attention=mha", "attention.positions=none"])
    theirs = nn.MultiheadAttention(D, H, bias=False, batch_first=True, dtype=torch.float64)
    copy_weights(
        theirs,
        {
            "in_proj_weight": torch.cat([ours.q_proj.weight, ours.k_proj.weight, ours.v_proj.weight]),
            "out_proj.weight": ours.o_proj.weight,
        },
    )
    mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=torch.float64)
    wanted, _ = theirs(x, x, x, attn_mask=mask, need_weights=False)
    assert relative_error(ours(x), wanted) < 1e-12


def test_gqa_is_mha_whose_groups_repeat_one_head(x: Tensor) -> None:
    gqa, mha = double(["attention=gqa", "attention.n_kv_heads=2"]), double(["attention=mha"])

    def repeated(weight: Tensor) -> Tensor:
        return weight.view(2, d, D).repeat_interleave(2, dim=0).reshape(H * d, D)

    copy_weights(
        mha,
        {
            "q_proj.weight": gqa.q_proj.weight,
            "o_proj.weight": gqa.o_proj.weight,
            "k_proj.weight": repeated(gqa.k_proj.weight),
            "v_proj.weight": repeated(gqa.v_proj.weight),
        },
    )
    assert relative_error(gqa(x), mha(x)) < 1e-12


@pytest.mark.parametrize(("groups", "end"), [(H, "mha"), (1, "mqa")])
def test_gqa_at_its_ends_is_mha_and_mqa(x: Tensor, groups: int, end: str) -> None:
    gqa, other = double(["attention=gqa", f"attention.n_kv_heads={groups}"]), double([f"attention={end}"])
    other.load_state_dict(gqa.state_dict())
    assert torch.equal(gqa(x), other(x))


@pytest.mark.parametrize(
    ("of_mha", "of_mla"),
    [
        (["attention=mha", "attention.positions=none"], ["attention=mla_plain"]),
        (["attention=mha"], ["attention=mla_plain", "attention.positions=rope_after_up"]),
        (["attention=mha_decoupled"], ["attention=mla"]),
        (["attention=mha_decoupled", "attention.qk_norm=true"], ["attention=mla", "attention.qk_norm=true"]),
    ],
    ids=["no rotation", "late rotation", "decoupled", "QK-norm"],
)
def test_full_rank_mla_is_mha_with_the_same_positions(x: Tensor, of_mha: list[str], of_mla: list[str]) -> None:
    mha = double(of_mha)
    mla = double([*of_mla, f"attention.kv_lora_rank={D}", "attention.latent_norm=none"])
    copy_weights(
        mla,
        {
            "q_proj.weight": mha.q_proj.weight,
            "kv_down_proj.weight": torch.eye(D, dtype=torch.float64),
            "k_up_proj.weight": mha.k_proj.weight,
            "v_up_proj.weight": mha.v_proj.weight,
            "o_proj.weight": mha.o_proj.weight,
        },
    )
    if "attention=mla" in of_mla:
        copy_weights(mla, {"k_rope_proj.weight": mha.k_rope_proj.weight})
    if "attention.qk_norm=true" in of_mla:
        copy_weights(mla, {"q_up_norm.weight": mha.q_norm.weight, "k_up_norm.weight": mha.k_norm.weight})
    assert relative_error(mla(x), mha(x)) < 1e-12


def test_normed_factors_are_the_factors_of_normed_keys(x: Tensor) -> None:
    """What tpa caches with QK-norm: the keys that they make have root mean square 1 in each head, but for the gain."""
    ours = double(["attention=tpa", "attention.qk_norm=true", "model.norm_eps=1e-12"])
    cache = new_cache(ours, 2, x.shape[1], dtype=torch.float64, device="cpu")
    ours(x, cache)
    k_a_BSRH, k_b_BSRK = (cache.buffers[name] for name in ("k_a", "k_b"))
    copy_weights(ours, {"k_norm.weight": torch.ones(d)})
    ours(x, cache := new_cache(ours, 2, x.shape[1], dtype=torch.float64, device="cpu"))
    assert not torch.equal(k_b_BSRK, cache.buffers["k_b"]) and torch.equal(k_a_BSRH, cache.buffers["k_a"])
    k_BSHK = torch.einsum("bsrh,bsrk->bshk", cache.buffers["k_a"], cache.buffers["k_b"]) / 2
    assert torch.allclose(k_BSHK.square().mean(dim=-1), torch.ones((), dtype=torch.float64), atol=1e-9)


@pytest.mark.parametrize("rank", [[], ["attention.q_lora_rank=20"]], ids=["no query rank", "query rank"])
def test_fused_down_projections_are_the_same_function(x: Tensor, rank: list[str]) -> None:
    separate = double(["attention=mla", *rank])
    fused = double(["attention=mla", "attention.fused_down_projections=true", *rank])
    q = separate.q_down_proj if rank else separate.q_proj
    shared = {k: v for k, v in separate.state_dict().items() if k in fused.state_dict()}
    copy_weights(
        fused, shared | {"in_proj.weight": torch.cat([q.weight, separate.kv_down_proj.weight, separate.k_rope_proj.weight])}
    )
    assert relative_error(fused(x), separate(x)) < 1e-12


def test_split_latents_are_a_joint_latent_whose_up_projections_read_one_half(x: Tensor) -> None:
    split = double(["attention=mla", "attention.kv_latent=split", "attention.latent_norm=none"])
    joint = double(["attention=mla", "attention.latent_norm=none"])
    shared = {k: v for k, v in split.state_dict().items() if "up_proj" not in k}
    zeros = torch.zeros(H * d, 12, dtype=torch.float64)
    copy_weights(
        joint,
        shared
        | {
            "k_up_proj.weight": torch.cat([split.k_up_proj.weight, zeros], dim=1),
            "v_up_proj.weight": torch.cat([zeros, split.v_up_proj.weight], dim=1),
        },
    )
    assert relative_error(joint(x), split(x)) < 1e-12


@pytest.mark.parametrize("q_lora_rank", [None, 20])
def test_mla_is_hugging_faces_deepseek_v3_attention(x: Tensor, q_lora_rank: int | None) -> None:
    modeling = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    from transformers import DeepseekV3Config

    config = DeepseekV3Config(
        hidden_size=D,
        num_attention_heads=H,
        num_key_value_heads=H,
        q_lora_rank=q_lora_rank,
        kv_lora_rank=24,
        qk_nope_head_dim=d,
        qk_rope_head_dim=6,
        v_head_dim=d,
        num_hidden_layers=1,
        rope_interleave=False,
        max_position_embeddings=64,
    )
    config._attn_implementation = "sdpa"
    theirs = modeling.DeepseekV3Attention(config, 0).double().eval()
    ours = double(["attention=mla", f"attention.q_lora_rank={q_lora_rank or 'null'}", "model.norm_eps=1e-6"])
    weights = {
        "kv_a_proj_with_mqa.weight": torch.cat([ours.kv_down_proj.weight, ours.k_rope_proj.weight]),
        "kv_a_layernorm.weight": ours.latent_norms[0].weight,
        "kv_b_proj.weight": torch.cat(
            [ours.k_up_proj.weight.view(H, d, 24), ours.v_up_proj.weight.view(H, d, 24)], dim=1
        ).reshape(2 * H * d, 24),
        "o_proj.weight": ours.o_proj.weight,
    }
    if q_lora_rank is None:
        weights["q_proj.weight"] = ours.q_proj.weight
    else:
        weights |= {
            "q_a_proj.weight": ours.q_down_proj.weight,
            "q_a_layernorm.weight": ours.q_latent_norm.weight,
            "q_b_proj.weight": ours.q_up_proj.weight,
        }
    copy_weights(theirs, weights)
    positions = torch.arange(x.shape[1])[None]
    rope = modeling.DeepseekV3RotaryEmbedding(config)(x, positions)
    T = x.shape[1]
    mask = torch.full((1, 1, T, T), float("-inf"), dtype=torch.float64).triu(1)
    wanted = theirs(x, position_embeddings=rope, attention_mask=mask)[0]
    assert relative_error(ours(x), wanted) < 1e-6
    # What is left comes from float32 inside theirs: the rotation tables and the norms. Without these it is the same.
    ours.rope.cos_SF[:T], ours.rope.sin_SF[:T] = (table[0, :, :3] for table in rope)
    for name in ("kv_a_layernorm", "q_a_layernorm"):
        if getattr(theirs, name, None) is not None:
            gain = getattr(theirs, name).weight
            setattr(theirs, name, nn.RMSNorm(len(gain), eps=1e-6, dtype=torch.float64))
            getattr(theirs, name).weight = gain
    wanted = theirs(x, position_embeddings=rope, attention_mask=mask)[0]
    assert relative_error(ours(x), wanted) < 1e-12
    for path in ("expand", "absorbed"):
        ours.decode = path
        for split in ([T], [9, 4, 1, 1, 1]):
            cache = new_cache(ours, 2, T, dtype=torch.float64, device="cpu")
            pieces = torch.cat([ours(piece, cache) for piece in x.split(split, dim=1)], dim=1)
            assert relative_error(pieces, wanted) < 1e-12, (path, split)


def test_mha_is_hugging_faces_llama_attention(x: Tensor) -> None:
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    from transformers import LlamaConfig

    config = LlamaConfig(hidden_size=D, num_attention_heads=H, num_key_value_heads=2, head_dim=d, max_position_embeddings=64)
    config._attn_implementation = "sdpa"
    theirs = modeling.LlamaAttention(config, 0).double().eval()
    ours = double(["attention=gqa"])
    theirs.load_state_dict(ours.state_dict())  # the names are the same
    rope = modeling.LlamaRotaryEmbedding(config)(x, torch.arange(x.shape[1])[None])
    wanted = theirs(x, position_embeddings=rope, attention_mask=None)[0]
    assert relative_error(ours(x), wanted) < 1e-6  # their rotation tables are float32


def test_tied_keys_and_values_are_gemma_4s_full_layers(x: Tensor) -> None:
    """One cached tensor in place of their two."""
    modeling = pytest.importorskip("transformers.models.gemma4.modeling_gemma4")
    from transformers import Gemma4TextConfig

    config = Gemma4TextConfig(
        hidden_size=D,
        num_hidden_layers=1,
        num_attention_heads=H,
        num_key_value_heads=4,
        num_global_key_value_heads=2,
        global_head_dim=d,
        layer_types=["full_attention"],
        rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 10000.0}},
        attention_k_eq_v=True,
    )
    config._attn_implementation = "eager"
    theirs = modeling.Gemma4TextAttention(config, 0).double().eval()
    ours = double(["attention=tied_kv"])
    assert (ours.scale, theirs.scaling) == (1.0, 1.0) and theirs.v_proj is None
    copy_weights(
        theirs,
        {
            "q_proj.weight": ours.q_proj.weight,
            "k_proj.weight": ours.kv_proj.weight,
            "o_proj.weight": ours.o_proj.weight,
            "q_norm.weight": 3 * ours.q_norm.weight,
            "k_norm.weight": ours.k_gain,
        },
    )
    copy_weights(ours, {"q_norm.weight": theirs.q_norm.weight})  # logits of several tens
    T = x.shape[1]
    cos_ST, sin_ST = (torch.cat((table, table), dim=-1)[None, :T] for table in (ours.rope.cos_SF, ours.rope.sin_SF))
    mask = torch.full((1, 1, T, T), float("-inf"), dtype=torch.float64).triu(1)
    wanted = theirs(x, (cos_ST, sin_ST), mask, {})[0]
    for split in ([T], [9, 4, 1, 1, 1]):
        cache = new_cache(ours, 2, T, dtype=torch.float64, device="cpu")
        pieces = torch.cat([ours(piece, cache) for piece in x.split(split, dim=1)], dim=1)
        assert relative_error(pieces, wanted) < 1e-5  # their norms are float32


def test_the_shared_vector_is_deepseek_v4s_without_pools_and_sinks(x: Tensor) -> None:
    modeling = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    from transformers import DeepseekV4Config

    K, P, T = 24, 6, x.shape[1]
    config = DeepseekV4Config(
        hidden_size=D,
        num_hidden_layers=1,
        num_attention_heads=H,
        head_dim=K,
        partial_rotary_factor=P / K,
        q_lora_rank=D,
        o_groups=1,
        o_lora_rank=D,
        layer_types=["sliding_attention"],
        sliding_window=2 * T,
    )
    config._attn_implementation = "eager"
    theirs = modeling.DeepseekV4Attention(config, 0).double().eval()
    ours = double(["attention=shared_kv"])
    assert ours.scale == theirs.scaling == K**-0.5
    # Their rotated pairs stand side by side; dimensions of values are in the same order.
    order_K = torch.cat((torch.arange(K - P), K - P + torch.arange(P).view(2, -1).T.flatten()))
    heads = ours.q_proj.weight.view(H, K, D)[:, order_K].flatten(0, 1)
    outputs = ours.o_proj.weight.view(D, H, K)[..., order_K].flatten(1)
    x = x / x.square().mean(dim=-1, keepdim=True).sqrt()  # which their norm of the queries' latent keeps as it is
    copy_weights(
        theirs,
        {
            "q_a_proj.weight": torch.eye(D),
            "q_a_norm.weight": torch.ones(D),
            "q_b_proj.weight": heads,
            "kv_proj.weight": ours.kv_proj.weight[order_K],
            "kv_norm.weight": ours.kv_norm.weight[order_K],
            "o_a_proj.weight": outputs,
            "o_b_proj.weight": torch.eye(D),
            "sinks": torch.full((H,), -1e9),
        },
    )
    cos_ST, sin_ST = ours.rope.cos_SF[None, :T], ours.rope.sin_SF[None, :T]
    mask = torch.full((1, 1, T, T), float("-inf"), dtype=torch.float64).triu(1)
    positions = torch.arange(T)[None]
    wanted = theirs(x, {"main": (cos_ST, sin_ST)}, positions, mask)[0]
    for split in ([T], [9, 4, 1, 1, 1]):
        cache = new_cache(ours, 2, T, dtype=torch.float64, device="cpu")
        pieces = torch.cat([ours(piece, cache) for piece in x.split(split, dim=1)], dim=1)
        assert relative_error(pieces, wanted) < 1e-5  # their norms and rotation are float32


def test_gated_heads_are_hugging_faces_qwen3_next_attention(x: Tensor) -> None:
    """Its query projection holds each head's gate behind the head's query; its norms' gains are stored less 1."""
    modeling = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    from transformers import Qwen3NextConfig

    config = Qwen3NextConfig(hidden_size=D, num_attention_heads=H, num_key_value_heads=2, head_dim=d)
    config._attn_implementation = "sdpa"
    theirs = modeling.Qwen3NextAttention(config, 0).double().eval()
    ours = double(["attention=gqa_gated", "attention.qk_norm=true"])
    heads = torch.cat([weight.view(H, d, D) for weight in (ours.q_proj.weight, ours.gate_proj.weight)], dim=1)
    copy_weights(
        theirs,
        {
            "q_proj.weight": heads.flatten(0, 1),
            "q_norm.weight": ours.q_norm.weight - 1,
            "k_norm.weight": ours.k_norm.weight - 1,
            **{f"{name}.weight": ours.get_parameter(f"{name}.weight") for name in ("k_proj", "v_proj", "o_proj")},
        },
    )
    tables = ours.rope.cos_SF, ours.rope.sin_SF
    wanted = theirs(x, tuple(torch.cat((table, table), dim=-1)[None, : x.shape[1]] for table in tables), None)[0]
    assert relative_error(ours(x), wanted) < 1e-6  # their norms are float32


def test_the_softmax_scale_counts_both_parts_of_a_key() -> None:
    assert attention_from(["attention=mla"]).scale == (12 + 6) ** -0.5
    assert attention_from(["attention=mha_decoupled"]).scale == (12 + 6) ** -0.5
    assert attention_from(["attention=mha_wide"]).scale == 18**-0.5
    assert attention_from(["attention=mla_plain"]).scale == 12**-0.5


def test_large_logits_are_the_same_on_every_backend() -> None:
    """Small logits hide a wrong scale; these reach a few hundred."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (10 * torch.randn(2, 9, 4, 6, dtype=torch.float64, generator=generator) for _ in range(3))
    wanted = torch.empty(2, 9, 4, 6, dtype=torch.float64)
    for b in range(2):
        for h in range(4):
            for t in range(9):
                logits = torch.stack([q[b, t, h] @ k[b, s, h] for s in range(t + 1)]) * 0.7
                wanted[b, t, h] = logits.softmax(0) @ v[b, : t + 1, h]
    assert wanted.isfinite().all() and (q[0, 8, 0] @ k[0, :, 0].T).abs().max() > 100
    for backend in ("reference", "sdpa", "sdpa_math", "sdpa_flash"):
        got, _ = attend(q, k, v, scale=0.7, causal=True, backend=backend)
        assert relative_error(got, wanted) < 1e-12, backend


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("part", ["a rotated key that heads share", "the last of each key", "sinks", "sinks and a rotated key"])
def test_one_query_meets_all_groups_where_they_lie(part: str, groups: int) -> None:
    """Keys and values are parts of longer buffers, of which a mask hides some; what is reserved beside them is NaN."""
    generator = torch.Generator().manual_seed(0)
    H, S, K, P = 4, 9, 6, 2
    rotated = P if "key" in part and part != "the last of each key" else 0
    q, k, v, k_rope, sinks = (
        3 * torch.randn(*shape, dtype=torch.float64, generator=generator)
        for shape in ((3, 1, H, K), (3, S, groups, K - rotated), (3, S, groups, 5), (3, S, P), (H,))
    )
    mask = torch.rand(3, 1, S, generator=generator) < 0.6
    mask[:, :, 0] = True
    options = {"mask_BTS": mask, "sink_logits_H": sinks if "sinks" in part else None, "scale": 0.7}
    shared = k_rope if part != "sinks" else None
    buffers = [torch.full((3, S + 4, *x.shape[2:]), float("nan"), dtype=torch.float64) for x in (k, v)]
    for buffer, x in zip(buffers, (k, v), strict=True):
        buffer[:, 2 : S + 2] = x
    got, _ = attend(q, *(buffer[:, 2 : S + 2] for buffer in buffers), k_rope_BSP=shared, **options)
    if shared is not None:
        k = torch.cat((k[..., : K - P], shared.unsqueeze(2).expand(-1, -1, groups, -1)), dim=-1)
    wanted, _ = attend(q, k, v, **options, backend="reference")
    with_gradient, _ = attend(q.requires_grad_(), k, v, **options)
    assert relative_error(got, wanted) < 1e-12 and relative_error(with_gradient.detach(), wanted) < 1e-12


def test_rotation_makes_logits_depend_on_distance_alone() -> None:
    rope = RotaryEmbedding(width=8, max_seq_len=64, theta=10000.0).double()
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def logit(i: int, j: int) -> float:
        return float((rotate(q, rope.tables(i, 1, None)) * rotate(k, rope.tables(j, 1, None))).sum())

    assert logit(5, 2) == pytest.approx(logit(48, 45), rel=1e-12)
    assert logit(5, 2) != pytest.approx(logit(5, 3), rel=1e-3)


def test_rotation_tables_survive_a_cast_of_the_model() -> None:
    rope = RotaryEmbedding(width=8, max_seq_len=1024, theta=10000.0)
    exact = rope.cos_SF.clone()
    rope.to(torch.bfloat16)
    assert rope.cos_SF.dtype == torch.float32 and torch.equal(rope.cos_SF, exact)


def test_the_narrow_rotated_part_spans_the_whole_range_of_frequencies() -> None:
    """Frequencies are computed over the rotated width itself, not over the first pairs of a wider head."""
    rope = RotaryEmbedding(width=8, max_seq_len=2, theta=10000.0)
    angles = torch.atan2(rope.sin_SF[1], rope.cos_SF[1])
    assert angles.tolist() == pytest.approx([1.0, 0.1, 0.01, 0.001], rel=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
def test_the_reference_rounds_bfloat16_once_at_the_end(autocast: bool) -> None:
    """Logits of several tens: rounded to bfloat16 they were off by 1 %, and what comes out by 0.14 % at least."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 64, heads, 64, generator=generator).bfloat16() for heads in (4, 2, 2))
    options: dict[str, Any] = {"scale": 2.0, "backend": "reference", "causal": True}
    exact, _ = attend(q.double(), k.double(), v.double(), **options)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out, weights = attend(q, k, v, **options, return_weights=True)
    assert out.dtype == torch.bfloat16 and weights is not None and weights.dtype == torch.float32
    assert relative_error(out, exact) < 2e-3
