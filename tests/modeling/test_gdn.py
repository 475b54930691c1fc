"""Gated DeltaNet: the layer is transformers' Qwen3-Next layer, and its state is one whatever it has taken in."""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.evaluation.cache_size import measure_cache
from modeling.attention.contract import randomise, relative_error
from modeling.attention.gdn import GatedDeltaNet
from modeling.attention.layer_cache import new_cache
from modeling.attention.layers import AttentionLayers
from modeling.generation import decode_step
from tests.support.variants import gpt_from

D, G, H, K, V, W = 24, 2, 6, 8, 5, 4
SIZES: dict[str, Any] = {
    "d_model": D,
    "n_heads": 3,
    "max_seq_len": 200,
    "causal": True,
    "bias": False,
    "norm_eps": 1e-6,
    "n_k_heads": G,
    "n_v_heads": H,
    "head_dim": K,
    "v_head_dim": V,
    "conv_width": W,
}


def layer(seed: int = 0, **changes: Any) -> GatedDeltaNet:
    """With the decays of a new layer, so that a state remembers, and other parameters of a size that shows."""
    torch.manual_seed(seed)
    made = GatedDeltaNet(**SIZES | changes).eval()
    kept = {name: getattr(made, name).detach().clone() for name in ("a_log", "dt_bias")}
    randomise(made, seed)
    with torch.no_grad():
        for name, value in kept.items():
            getattr(made, name).copy_(value)
        made.decay_proj.weight.mul_(0.1)
    return made


def drawn(T: int, rows: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, T, D, generator=torch.Generator().manual_seed(1), dtype=dtype)


def theirs_with(ours: GatedDeltaNet) -> tuple[Any, Any]:
    """transformers' layer with the same weights: of each key head its query, key, values and gates stand together."""
    modeling = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    config = modeling.Qwen3NextConfig(
        hidden_size=D,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        linear_num_key_heads=G,
        linear_num_value_heads=H,
        linear_key_head_dim=K,
        linear_value_head_dim=V,
        linear_conv_kernel_dim=W,
        rms_norm_eps=1e-6,
    )
    theirs = modeling.Qwen3NextGatedDeltaNet(config, 0).eval()

    def by_key_head(*projections: nn.Linear) -> Tensor:
        return torch.cat([p.weight.unflatten(0, (G, -1)) for p in projections], dim=1).flatten(0, 1)

    theirs.load_state_dict(
        {
            "in_proj_qkvz.weight": by_key_head(ours.q_proj, ours.k_proj, ours.v_proj, ours.gate_proj),
            "in_proj_ba.weight": by_key_head(ours.beta_proj, ours.decay_proj),
            "conv1d.weight": ours.conv.weight,
            "A_log": ours.a_log,
            "dt_bias": ours.dt_bias,
            "norm.weight": ours.o_norm.weight,
            "out_proj.weight": ours.o_proj.weight,
        }
    )
    return theirs, config


@torch.no_grad()
@pytest.mark.parametrize("T", [1, 70, 150])
def test_the_whole_layer_is_transformers(T: int) -> None:
    """In one call, of less than a chunk of 64 tokens and of several."""
    ours = layer()
    theirs, _ = theirs_with(ours)
    assert relative_error(ours(drawn(T)), theirs(drawn(T))) < 1e-5


@torch.no_grad()
def test_token_by_token_it_is_transformers_too() -> None:
    """After a prompt, each through its own cache: ours holds what theirs holds."""
    ours, x_BTD = layer(), drawn(90)
    theirs, config = theirs_with(ours)
    cache_utils = pytest.importorskip("transformers.cache_utils")
    their_cache = cache_utils.DynamicCache(config=config)
    if not hasattr(their_cache, "get_conv_state"):
        pytest.skip("this transformers keeps the states elsewhere")
    cache = new_cache(ours, 2, 90, dtype=torch.float32, device="cpu")
    for piece in x_BTD.split([70] + [1] * 20, dim=1):
        assert relative_error(ours(piece, cache), theirs(piece, cache_params=their_cache)) < 1e-5
    assert relative_error(cache.states["state"], their_cache.get_recurrent_state(0, state_idx=0)) < 1e-5
    their_tail = their_cache.get_conv_state(0, state_idx=0)[..., -(W - 1) :]
    assert relative_error(cache.states["tail"], their_tail.transpose(1, 2)) < 1e-5


@torch.no_grad()
def test_chunks_and_single_tokens_are_one_function_in_float64() -> None:
    ours, x_BTD = layer().double(), drawn(150, dtype=torch.float64)
    full = ours(x_BTD)
    for split in ([150], [1] * 150, [70, 1, 1, 64, 14], [2, 3, 145]):
        cache = new_cache(ours, 2, 150, dtype=torch.float64, device="cpu")
        pieces = torch.cat([ours(piece, cache) for piece in x_BTD.split(split, dim=1)], dim=1)
        assert relative_error(pieces, full) < 1e-12


@torch.no_grad()
def test_pads_change_neither_state_nor_tail_and_rows_that_do_not_run_take_in_nothing() -> None:
    """A row of 1 token has a tail that reaches back before the padded call; pads hold what would be seen."""
    ours, x_BTD = layer(), drawn(30, rows=3)
    lengths, before = (12, 5, 1), 7
    for left in (False, True):
        padded = torch.full((3, 12, D), 50.0)
        valid_BT = torch.zeros(3, 12, dtype=torch.bool)
        for row, n in enumerate(lengths):
            place = slice(12 - n, 12) if left else slice(0, n)
            padded[row, place], valid_BT[row, place] = x_BTD[row, before : before + n], True
        cache = new_cache(ours, 3, 40, dtype=torch.float32, device="cpu")
        ours(x_BTD[:, :before], cache)
        ours(padded, cache, valid_BT=valid_BT)
        running_B1 = torch.tensor([[True], [False], [True]])
        ours(x_BTD[:, :1], cache, valid_BT=running_B1)
        for row, n in enumerate(lengths):
            alone = new_cache(ours, 1, 40, dtype=torch.float32, device="cpu")
            ours(x_BTD[row : row + 1, : before + n], alone)
            if running_B1[row]:
                ours(x_BTD[row : row + 1, :1], alone)
            assert cache.lengths_B[row] == alone.lengths_B[0]
            for name, state in alone.states.items():
                assert relative_error(cache.states[name][row], state[0]) < 1e-6, (left, row, name)


@torch.no_grad()
def test_a_static_cache_changes_its_states_where_they_lie() -> None:
    """A captured step reads and writes the same memory at every replay."""
    ours, x_BTD = layer(), drawn(9)
    cache = new_cache(ours, 2, 9, dtype=torch.float32, device="cpu")
    ours(x_BTD[:, :8], cache)
    cache.make_static()
    lies = {name: state.data_ptr() for name, state in cache.states.items()}
    out = ours(x_BTD[:, 8:], cache)
    assert {name: state.data_ptr() for name, state in cache.states.items()} == lies
    assert relative_error(out, ours(x_BTD)[:, 8:]) < 1e-5


def test_gradients_flow_through_the_states_of_an_eager_cache() -> None:
    """In pieces as in one: nothing that a backward pass needs is overwritten."""
    grads = []
    for split in ([20], [8, 1, 11]):
        ours, x_BTD = layer(), drawn(20).requires_grad_()
        cache = new_cache(ours, 2, 20, dtype=torch.float32, device="cpu")
        out = torch.cat([ours(piece, cache) for piece in x_BTD.split(split, dim=1)], dim=1)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        grads.append([x_BTD.grad, *(parameter.grad for parameter in ours.parameters())])
    for ours_grad, right in zip(*grads, strict=True):
        assert ours_grad is not None and right is not None
        assert relative_error(ours_grad, right) < 1e-5


@torch.no_grad()
def test_tokens_are_taken_back_with_a_copy_of_the_states_and_not_without() -> None:
    ours, x_BTD = layer(), drawn(6)
    cache = new_cache(ours, 2, 6, dtype=torch.float32, device="cpu")
    ours(x_BTD[:, :5], cache)
    copies = {name: state.clone() for name, state in cache.states.items()}
    first = ours(x_BTD[:, 5:], cache)
    with pytest.raises(ValueError, match="state, tail holds all 1 tokens that are to be taken back"):
        cache.take_back(1)
    cache.take_back(1, copies)
    assert cache.lengths_B.tolist() == [5, 5]
    assert torch.equal(ours(x_BTD[:, 5:], cache), first)


@pytest.mark.parametrize(
    ("dtype", "state", "tail"),
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float16, torch.float32, torch.float16),
        (torch.int8, torch.float32, torch.bfloat16),
        (torch.float8_e4m3fn, torch.float32, torch.bfloat16),
    ],
    ids=str,
)
def test_a_state_is_in_float32_and_never_in_eight_bits(dtype: torch.dtype, state: torch.dtype, tail: torch.dtype) -> None:
    cache = new_cache(layer(), 3, 50, dtype=dtype, device="cpu")
    assert {name: held.dtype for name, held in cache.states.items()} == {"state": state, "tail": tail}
    assert cache.nbytes == 3 * (4 * H * K * V + tail.itemsize * 3 * (2 * G * K + H * V)) == 3 * cache.state_bytes
    assert cache.bytes_per_token == 0 and not cache.stored


def test_a_hybrids_cache_is_a_constant_and_the_tokens_of_its_full_layers() -> None:
    """At SIZES of the variants: 4 heads of 12 and 8 of values; states in float32, tails and tokens in bfloat16."""
    size = measure_cache(gpt_from(["attention=gdn_3_1"]), dtype=torch.bfloat16)
    states, token = 3 * (4 * 8 * 12 * 12 + 2 * 3 * (2 * 4 * 12 + 8 * 12)), 2 * 2 * 2 * 12
    assert size.state_bytes == states and size.held_bytes_per_token == token
    assert size.bytes_by_context == {context: states + token * context for context in (1024, 8192, 32768, 131072)}
    assert size.bytes_per_token == states / 64 + token  # of the 64 tokens that the model takes


def test_a_new_layer_remembers_and_its_gates_are_not_decayed_as_matrices_are() -> None:
    """Decays of a new layer are the authors': the median head holds e^-8 of a token after a hundred others, and not e^-1000."""
    torch.manual_seed(0)
    made = GatedDeltaNet(**SIZES | {"n_v_heads": 256})
    decay_H = torch.exp(-made.a_log.exp() * torch.nn.functional.softplus(made.dt_bias))
    assert decay_H.min() > 0.2 and (decay_H**100).median() > 1e-4 and decay_H.max() < 1
    assert made.a_log.exp().max() <= 16 and made.a_log.exp().min() >= 0.01
    steps_H = torch.nn.functional.softplus(made.dt_bias)
    assert steps_H.min() >= 0.99e-3 and steps_H.max() <= 0.101
    assert abs(steps_H.log().mean() - math.log(1e-2)) < 0.3  # uniform in the logarithm
    assert made.a_log.ndim == made.dt_bias.ndim == 1  # by which an optimizer knows what not to decay


def test_a_model_draws_the_convolution_as_it_draws_embeddings() -> None:
    for attention in gpt_from(["attention=gdn_3_1"], init="fan_in", init_std=0.03).attentions[:3]:
        assert attention.conv.weight.std().item() == pytest.approx(0.03, rel=0.1)
        assert attention.a_log.std() > 0.1


@torch.no_grad()
def test_a_compiled_decode_step_gives_what_an_eager_one_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    part: Any = AttentionLayers([layer()])
    x_BTD = drawn(14)
    logits = []
    for step in ("eager", "compile"):
        cache = part.new_cache(2, 14, dtype=torch.float32, device="cpu")
        part(x_BTD[:, :10], cache)
        decode = decode_step(part, cache, step, x_BTD[:, 10], None)
        logits.append(torch.stack([decode(x_BTD[:, t], None) for t in range(10, 14)]))
        with pytest.raises(ValueError, match="14 are taken"):
            decode(x_BTD[:, 0], None)
    assert relative_error(logits[1], logits[0]) < 1e-6


def test_autocast_leaves_the_rule_in_float32() -> None:
    ours, x_BTD = layer(), drawn(100)
    wanted = ours(x_BTD)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = copy.deepcopy(ours)(x_BTD)
    assert 1e-5 < relative_error(found, wanted) < 0.03


REFUSED = {
    "n_v_heads=3": "n_v_heads=3 do not share n_k_heads=2 heads of queries and keys evenly: choose a multiple of 2",
    "n_k_heads=0": "n_k_heads=0 leaves nothing of the state: choose 1 or more",
    "v_head_dim=0": "v_head_dim=0 leaves nothing of the state",
    "conv_width=1": "conv_width=1 sees no token but the newest: choose 2 or more, such as 4",
}


@pytest.mark.parametrize("change", REFUSED)
def test_sizes_that_do_not_fit_are_refused_in_one_sentence(change: str) -> None:
    name, _, value = change.partition("=")
    with pytest.raises(ValueError) as caught:
        GatedDeltaNet(**SIZES | {name: int(value)})
    assert REFUSED[change] in str(caught.value)
