"""benchmarks/latent_decode.py hands FlashAttention-3 what its documentation asks for, with stand-ins for its two builds."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.latent_decode import KERNELS, Case, LatentDecodeOptions
from modeling.kernels.latent_decode import latent_decode

INPUTS, B, S, H, L, P = 2, 3, 128, 4, 32, 8
LENGTHS = [128, 1, 70]


def make_case(*, rotated: bool = True) -> Case:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(INPUTS, B, *shape, generator=generator)

    q_rope, k_rope = (normal(H, P), normal(S, P)) if rotated else (None, None)
    return Case(normal(H, L), q_rope, normal(S, L), k_rope, torch.tensor(LENGTHS), 0.2)


def attend(q_BHP: Tensor, qv_BHL: Tensor, k_BSP: Tensor, v_BSL: Tensor, lengths_B: Tensor, scale: float) -> Tensor:
    """softmax(scale (q k^T + qv v^T)) v over the first lengths_B slots, as FlashAttention-3 defines its `qv`."""
    logits_BHS = scale * (q_BHP @ k_BSP.mT + qv_BHL @ v_BSL.mT)
    beyond_BS = torch.arange(v_BSL.shape[1]) >= lengths_B[:, None]
    return logits_BHS.masked_fill(beyond_BS[:, None], -torch.inf).softmax(-1) @ v_BSL


def schedule_of(made: list[dict[str, Any]]) -> Any:
    def get_scheduler_metadata(
        batch_size: int,
        max_seqlen_q: int,
        max_seqlen_k: int,
        num_heads_q: int,
        num_heads_kv: int,
        headdim: int,
        cache_seqlens: Tensor,
        **kinds: Any,
    ) -> Tensor:
        assert (batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim) == (B, 1, S, H, 1, P)
        assert cache_seqlens.dtype == torch.int32 and cache_seqlens.tolist() == LENGTHS
        made.append(kinds)
        return torch.tensor([len(made)])

    return get_scheduler_metadata


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    qv: Tensor,
    cache_seqlens: Tensor,
    softmax_scale: float,
    scheduler_metadata: Tensor,
    num_splits: int,
) -> Tensor:
    assert q.shape == (B, 1, H, P) and qv.shape == (B, 1, H, L)
    assert k_cache.shape == (B, S, 1, P) and v_cache.shape == (B, S, 1, L)
    assert cache_seqlens.dtype == torch.int32 and scheduler_metadata.tolist() == [1] and num_splits == 5
    return attend(q[:, 0], qv[:, 0], k_cache[:, :, 0], v_cache[:, :, 0], cache_seqlens, softmax_scale)[:, None]


def flash_attn_varlen_func(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_v: Tensor,
    max_seqlen_q: int,
    cu_seqlens_q: Tensor,
    max_seqlen_k: int,
    seqused_k: Tensor,
    block_table: Tensor,
    softmax_scale: float,
    causal: bool,
    fa_version: int,
    scheduler_metadata: Tensor,
    num_splits: int,
) -> Tensor:
    assert causal and fa_version == 3 and scheduler_metadata.tolist() == [1] and num_splits == 5
    assert k.shape[1:] == (64, 1, P) and v.shape[1:] == (64, 1, L) and q.shape == (B, H, P)
    assert max_seqlen_q == 1 and max_seqlen_k == S and cu_seqlens_q.tolist() == list(range(B + 1))
    assert block_table.dtype == cu_seqlens_q.dtype == seqused_k.dtype == torch.int32
    k_BSP, v_BSL = (pages[block_table].flatten(1, 2)[:, :, 0] for pages in (k, v))
    return attend(q, q_v, k_BSP, v_BSL, seqused_k, softmax_scale)


@pytest.mark.parametrize(
    ("kernel", "module", "kinds"),
    [
        ("fa3", "flash_attn_interface", {}),
        ("fa3", "fa3_fwd_interface", {}),
        ("fa3_vllm", "vllm.vllm_flash_attn", {"page_size": 64, "causal": True}),
    ],
)
def test_flash_attention_3_computes_our_attention_from_what_it_is_given(
    kernel: str, module: str, kinds: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[dict[str, Any]] = []
    stand_in = types.ModuleType(module)
    stand_in.__dict__.update(
        get_scheduler_metadata=schedule_of(made),
        flash_attn_with_kvcache=flash_attn_with_kvcache,
        flash_attn_varlen_func=flash_attn_varlen_func,
    )
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    monkeypatch.setitem(sys.modules, "vllm", types.ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, module, stand_in)
    case = make_case()
    call, plan = KERNELS[kernel](case, LatentDecodeOptions(splits=5))
    for i in range(INPUTS):
        torch.testing.assert_close(call(i), latent_decode(*case.arguments(i), scale=case.scale))
    assert plan == "/5" and len(made) == 1, "its schedule is made once, before the calls"
    starts = made[0].pop("cu_seqlens_q", None)
    assert starts is None or starts.tolist() == list(range(B + 1))
    assert made == [{"qkv_dtype": torch.float32, "headdim_v": L, "num_splits": 5, **kinds}]
    with pytest.raises(ValueError, match=r"^FlashAttention-3 needs a rotated part as its key$"):
        KERNELS[kernel](make_case(rotated=False), LatentDecodeOptions())


@pytest.mark.parametrize(("kernel", "package"), [("fa3", "fa3_fwd_interface"), ("fa3_vllm", "vllm")])
def test_without_its_package_the_name_of_the_package_is_said(
    kernel: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("flash_attn_interface", "fa3_fwd_interface", "vllm"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=package):
        KERNELS[kernel](make_case(), LatentDecodeOptions())
