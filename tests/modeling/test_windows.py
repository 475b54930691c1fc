"""Windows, sinks and partial rotation against transformers' classes and the equation written out; what is refused."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.config.build import build_model
from harness.config.compose import load_train_config
from harness.errors import UserError
from harness.evaluation.cache_size import measure_cache
from modeling.attention.contract import randomise, relative_error
from modeling.attention.layer_cache import new_cache
from modeling.kernels.attend import attend
from tests.support.variants import SIZES, attention_from, gpt_from

D, H, G, d, T = 48, 4, 2, 12, 23  # SIZES
SPLITS: tuple[list[int], ...] = ([T], [9, 7, 4, 1, 1, 1], [1] * T)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def in_pieces(layer: Any, x: Tensor, split: list[int]) -> Tensor:
    cache = new_cache(layer, 2, T, dtype=torch.float64, device="cpu")
    return torch.cat([layer(piece, cache) for piece in x.split(split, dim=1)], dim=1)


@pytest.mark.parametrize("window", [None, 1, 5, 16])
@torch.no_grad()
def test_windows_and_sinks_are_gpt_oss_attention(x: Tensor, window: int | None) -> None:
    modeling = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    from transformers import GptOssConfig
    from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

    config = GptOssConfig(
        hidden_size=D,
        num_hidden_layers=1,
        num_attention_heads=H,
        num_key_value_heads=G,
        head_dim=d,
        sliding_window=window or 1,
        layer_types=["full_attention" if window is None else "sliding_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        max_position_embeddings=64,
    )
    config._attn_implementation = "eager"
    theirs = modeling.GptOssAttention(config, 0).double().eval()
    overrides = ["attention=swa_sinks", "attention.layers=[local]", "attention.projection_bias=all"]
    ours = attention_from([*overrides, f"attention.kinds.local.window={window or 'null'}"]).double().eval()
    randomise(ours)
    ours.sink_logits.copy_(torch.tensor([30.0, -2.0, 0.0, 12.0]))  # among logits of several tens
    state = dict(ours.state_dict())
    theirs.load_state_dict(state | {"sinks": state.pop("sink_logits")})
    masks = create_causal_mask if window is None else create_sliding_window_causal_mask
    mask = masks(config=config, inputs_embeds=x, attention_mask=None, past_key_values=None)
    rope = modeling.GptOssRotaryEmbedding(config)(x, torch.arange(T)[None])
    wanted, weights = theirs(x, rope, mask)
    left = weights.sum(dim=-1)
    assert left.min() < 0.5 and left.max() > 0.9, "the sinks take nothing, or everything"
    for got in (ours(x), *(in_pieces(ours, x, split) for split in SPLITS)):
        assert relative_error(got, wanted) < 1e-6  # their rotation tables are float32


@torch.no_grad()
def test_partial_rotation_is_stablelms(x: Tensor) -> None:
    modeling = pytest.importorskip("transformers.models.stablelm.modeling_stablelm")
    from transformers import StableLmConfig

    config = StableLmConfig(
        hidden_size=D,
        num_attention_heads=H,
        num_key_value_heads=G,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        max_position_embeddings=64,
    )
    config._attn_implementation = "sdpa"
    theirs = modeling.StableLmAttention(config, 0).double().eval()
    ours = randomise(attention_from(["attention=gqa_partial"])).double().eval()
    theirs.load_state_dict(ours.state_dict())
    rope = modeling.StableLmRotaryEmbedding(config)(x, torch.arange(T)[None])
    wanted = theirs(x, position_embeddings=rope)[0]
    for got in (ours(x), *(in_pieces(ours, x, split) for split in SPLITS)):
        assert relative_error(got, wanted) < 1e-6


def operands(tokens: int, *, large: float = 6.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((2, tokens, H, d), (2, tokens, G, d), (2, tokens, G, 7))
    made = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]
    return [large * made[0], made[1], made[2]]


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize(("tokens", "window"), [(24, 6), (24, 1), (23, 5), (7, 3), (7, 4), (7, 7), (7, 9), (1, 1), (2, 1)])
def test_a_window_in_blocks_is_the_equation_with_its_gradients_also_with_large_logits(
    tokens: int, window: int, with_sinks: bool
) -> None:
    sinks = torch.tensor([9.0, 0.0, -4.0, 25.0], dtype=torch.float64) if with_sinks else None
    found = {}
    for backend in ("reference", "sdpa", "sdpa_math"):
        inputs = [each.requires_grad_() for each in operands(tokens)]
        own = None if sinks is None else sinks.clone().requires_grad_()
        out, _ = attend(*inputs, scale=d**-0.5, causal=True, window=window, sink_logits_H=own, backend=backend)
        (out * torch.arange(1.0, 8, dtype=torch.float64)).sum().backward()
        found[backend] = [out, *(each.grad for each in inputs), *(() if own is None else (own.grad,))]
    q, k, v = operands(tokens)
    logits = torch.einsum("bthk,bshk->bhts", q, k.repeat_interleave(H // G, dim=2)) * d**-0.5
    seen = torch.tensor([[0 <= t - s < window for s in range(tokens)] for t in range(tokens)])
    exps = (logits.masked_fill(~seen, -torch.inf) - 20).exp()
    besides = 0 if sinks is None else (sinks - 20).exp()[None, :, None, None]
    weights = exps / (exps.sum(dim=-1, keepdim=True) + besides)
    written_out = torch.einsum("bhts,bshv->bthv", weights, v.repeat_interleave(H // G, dim=2))
    assert relative_error(found["reference"][0], written_out) < 1e-12
    for backend, wanted in itertools.product(("sdpa", "sdpa_math"), range(len(found["reference"]))):
        # The gradient of queries is zero where each sees itself alone.
        ours, theirs = found[backend][wanted], found["reference"][wanted]
        assert (ours - theirs).norm() <= 1e-10 * max(1.0, theirs.norm()), (backend, wanted)


@torch.no_grad()
def test_one_query_beside_sinks_is_the_last_of_many() -> None:
    sinks = torch.tensor([9.0, 0.0, -4.0, 25.0], dtype=torch.float64)
    q, k, v = operands(9)
    whole, _ = attend(q, k, v, scale=d**-0.5, causal=True, sink_logits_H=sinks)
    last, _ = attend(q[:, -1:], k, v, scale=d**-0.5, sink_logits_H=sinks)
    assert relative_error(last, whole[:, -1:]) < 1e-12
    hidden = torch.ones(2, 1, 12, dtype=torch.bool)
    hidden[..., 9:] = False
    longer = [torch.cat((each, each[:, :3]), dim=1) for each in (k, v)]
    masked, _ = attend(q[:, -1:], *longer, scale=d**-0.5, mask_BTS=hidden, sink_logits_H=sinks)
    assert relative_error(masked, last) < 1e-12


@torch.no_grad()
def test_a_sink_far_below_all_logits_changes_nothing_and_one_far_above_leaves_nothing() -> None:
    layer = randomise(attention_from(["attention=gqa", "attention.sink_logits=true"])).eval()
    plain = attention_from(["attention=gqa"]).eval()
    plain.load_state_dict({name: value for name, value in layer.state_dict().items() if name != "sink_logits"})
    x = torch.randn(2, T, D, generator=torch.Generator().manual_seed(0))
    layer.sink_logits.fill_(-1e4)
    assert relative_error(layer(x), plain(x)) < 1e-6
    layer.sink_logits.fill_(1e4)
    assert layer(x).abs().max() < 1e-6


def test_a_pattern_of_windows_allocates_each_layers_own_at_every_context() -> None:
    model = gpt_from(["attention=swa_3_1"])
    assert [attention.window for attention in model.attentions] == [16, 16, 16, None]
    per_token = 2 * G * d * 2  # bytes of a layer
    for context in (8, 16, 17, 64):
        caches = model.new_cache(1, context, dtype=torch.bfloat16, device="meta")
        assert [cache.nbytes for cache in caches] == [per_token * min(context, 16)] * 3 + [per_token * context]
    size = measure_cache(model, dtype=torch.bfloat16, window=8, sinks=2)
    assert size.bytes_at_context == per_token * (8 + 2) * 4
    size = measure_cache(model, dtype=torch.bfloat16, window=20, sinks=2)
    assert size.bytes_at_context == per_token * (3 * 16 + 22)


@torch.no_grad()
def test_a_windowed_layer_forgets_what_is_further_back_and_a_full_one_does_not() -> None:
    for variant, remembers in (("gqa", True), ("swa_1_1", True), ("local", False)):
        if variant == "local":
            model = gpt_from(["attention=swa_1_1", "attention.layers=[local]"])
        else:
            model = gpt_from([f"attention={variant}"])
        randomise(model).eval()
        tokens = torch.randint(100, (1, 50), generator=torch.Generator().manual_seed(0))
        changed = tokens.clone()
        changed[0, 3] = (changed[0, 3] + 1) % 100
        # Two layers of 16 carry something 30 places on.
        assert torch.equal(model(tokens)[:, 40], model(changed)[:, 40]) is not remembers


REFUSED = {
    "attention=gqa attention.window=65": "attention=gqa: window=65 is longer than the context, model.max_seq_len=64: choose a "
    "shorter one, or null to see everything",
    "attention=swa_1_1 attention.kinds.local.window=100": "attention=swa_1_1.local: window=100 is longer than the context",
    "attention=gqa attention.window=0": "window=0 sees nothing; choose 1 or more, or null for the whole context",
    "attention=gqa attention.rotary_fraction=0.25": "rotary_fraction=0.25 of head_dim=12 is 3 dimensions, and an even number "
    "from 2 to 12 can be turned: choose one of 0.166667, 0.333333, 0.5",
    "attention=gqa attention.rotary_fraction=0": "rotary_fraction=0.0 of head_dim=12 is 0 dimensions",
    "attention=gqa attention.rotary_fraction=1.5": "rotary_fraction=1.5 of head_dim=12 is 18 dimensions, and an even number "
    "from 2 to 12 can be turned",
    "attention=mha_learned attention.rotary_fraction=0.5": "rotary_fraction=0.5 does not go with positions=learned",
    "attention=swa_3_1": "layers names 4 layers and the model has 2: shorten the pattern, or raise model.n_layers",
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_is_impossible_is_refused_in_one_sentence(line: str) -> None:
    with pytest.raises(UserError) as caught:
        build_model(load_train_config([*SIZES, *line.split(" ")]), 100)
    assert REFUSED[line] in str(caught.value)


def test_a_window_looks_back_alone() -> None:
    with pytest.raises(ValueError, match="window=3 is for causal=True"):
        attend(*operands(4), scale=1.0, window=3)


def test_a_field_of_a_kind_can_be_set_also_where_its_yaml_is_silent() -> None:
    config = load_train_config([*SIZES, "attention=swa_1_1", "attention.kinds.full.qk_norm=true"])
    assert config.attention["kinds"] == {"local": {"window": 16}, "full": {"qk_norm": True}}
    longer = load_train_config([*SIZES, "attention=swa_1_1", "model.max_seq_len=40", "model.n_layers=3"])
    assert longer.attention["kinds"]["local"] == {"window": 10}


def test_a_window_where_later_tokens_are_seen_is_refused() -> None:
    with pytest.raises(
        UserError, match="window=4 looks back alone, and causal=False looks ahead too: leave one of the two out"
    ):
        gpt_from(["attention=gqa", "attention.window=4"], causal=False)
