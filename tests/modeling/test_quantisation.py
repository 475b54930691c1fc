"""Eight-bit storage: how far off it may be, and what the cache keeps of it."""

from __future__ import annotations

import pytest
import torch

from modeling.attention.cache import Cache
from modeling.attention.quantisation import LARGEST, dequantise, quantise
from tests.support.variants import gpt_from

EIGHT = list(LARGEST)


def noise(*shape: int, spread: float = 1.0) -> torch.Tensor:
    return spread * torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("spread", [1e-30, 1e-6, 1.0, 1e6])
def test_int8_is_within_half_a_step_of_every_element(spread: float) -> None:
    x = noise(5, 7, 64, spread=spread)
    payload, scale = quantise(x, torch.int8)
    assert payload.dtype == torch.int8 and scale.dtype == torch.bfloat16 and scale.shape == (5, 7)
    step = x.abs().amax(dim=-1, keepdim=True) / 127
    assert ((dequantise(payload, scale, torch.float32) - x).abs() <= 0.51 * step).all()
    assert scale.float().max() <= step.max() * 1.02  # the scale's own rounding costs at most 2 % of the resolution


def test_fp8_is_within_a_sixteenth_of_every_element_that_is_not_tiny() -> None:
    x = noise(5, 7, 64)
    back = dequantise(*quantise(x, torch.float8_e4m3fn), torch.float32)
    large = x.abs() > x.abs().amax(dim=-1, keepdim=True) / 1000  # three bits of mantissa down to there
    assert ((back - x).abs() <= x.abs() / 16 * 1.001)[large].all()


@pytest.mark.parametrize("dtype", EIGHT)
def test_the_largest_element_does_not_saturate(dtype: torch.dtype) -> None:
    x = torch.tensor([[1.0, -0.3], [-3.99, 0.1], [1e-3, 1e-3], [65000.0, 1.0]])
    back = dequantise(*quantise(x, dtype), torch.float32)
    peak = x.abs().argmax(dim=-1, keepdim=True)
    assert torch.allclose(back.gather(1, peak), x.gather(1, peak), rtol=0.005 if dtype == torch.int8 else 0.04)


@pytest.mark.parametrize("dtype", EIGHT)
def test_zeros_come_back_as_zeros_and_nan_as_nan(dtype: torch.dtype) -> None:
    assert (dequantise(*quantise(torch.zeros(2, 3), dtype), torch.float32) == 0).all()
    broken = torch.tensor([[1.0, float("nan")], [1.0, 2.0]])
    back = dequantise(*quantise(broken, dtype), torch.float32)
    assert back[0].isnan().any() and back[1].isfinite().all()


@pytest.mark.parametrize("dtype", EIGHT)
def test_the_scale_is_per_token_and_head(dtype: torch.dtype) -> None:
    """A huge head or token costs its neighbours nothing."""
    x = noise(1, 4, 2, 16)
    alone = dequantise(*quantise(x, dtype), torch.float32)
    x[0, 1, 0] *= 1e4
    together = dequantise(*quantise(x, dtype), torch.float32)
    keep = torch.ones(4, 2, dtype=torch.bool)
    keep[1, 0] = False
    assert torch.equal(together[0][keep], alone[0][keep])


# --- in the cache ----------------------------------------------------------------------------------------------------

SHAPES: dict[str, tuple[int, ...]] = {"latent": (6,), "k_rope": (4,), "k": (2, 3)}


@pytest.mark.parametrize("dtype", EIGHT)
@pytest.mark.parametrize("static", [False, True])
def test_what_is_read_is_what_the_payload_and_scale_stand_for_and_the_rotated_key_keeps_16_bits(
    dtype: torch.dtype, static: bool
) -> None:
    cache = Cache(2, 8, SHAPES, dtype=dtype, device="cpu", static=static)
    assert {name: buffer.dtype for name, buffer in cache.buffers.items()} == {
        "latent": dtype, "k_rope": torch.bfloat16, "k": dtype,
    }  # fmt: skip
    assert {name: tuple(scale.shape) for name, scale in cache.scales.items()} == {"latent": (2, 8), "k": (2, 8, 2)}
    assert cache.bytes_per_token == 6 + 2 + 2 * 4 + 6 + 2 * 2
    assert cache.elements_per_token == 6 + 4 + 6
    assert cache.nbytes == 2 * 8 * cache.bytes_per_token
    new = {name: noise(2, 5, *shape) for name, shape in SHAPES.items()}
    cache.append(**{name: tensor[:, :3] for name, tensor in new.items()})
    seen = cache.append(torch.tensor([[True, True], [True, False]]), **{name: t[:, 3:] for name, t in new.items()})
    assert cache.lengths_B.tolist() == [5, 4]
    for name, tensor in new.items():
        wanted = tensor if name == "k_rope" else dequantise(*quantise(tensor, dtype), torch.float32)
        for row, length in enumerate((5, 4)):
            assert torch.equal(
                seen[name][row, :length].to(wanted.dtype), wanted[row, :length].to(seen[name].dtype).float()
            )


def test_bytes_of_the_shipped_variants_written_out_by_hand() -> None:
    """One layer at the tests' sizes: 4 heads of 12, latent 24, rotated key 6; two bytes a scale."""
    by_hand = {"mha": 2 * 4 * (12 + 2), "gqa": 2 * 2 * (12 + 2), "mqa": 2 * (12 + 2), "mla_plain": 24 + 2,
               "mla": 24 + 2 + 2 * 6, "mha_decoupled": 2 * 4 * (12 + 2) + 2 * 6, "mha_wide": 4 * (18 + 2 + 12 + 2)}  # fmt: skip
    for dtype in EIGHT:
        for variant, wanted in by_hand.items():
            (cache,) = gpt_from([f"attention={variant}"], n_layers=1).new_cache(1, 4, dtype=dtype, device="cpu")
            assert cache.bytes_per_token == wanted, variant
