"""FlashInfer's kernels for latent attention (Ye et al. 2025, arXiv 2501.01005) over our caches as they lie; nothing is copied.

They read pages through a table. A buffer (B, max_seq_len, L) of which the first S slots are seen is such a cache: its pages
lie one after the other, and row b's begin at b * max_seq_len. The plan that spreads the work over the device is made on the
host from the lengths themselves: a call waits for them, plans where they are not those of the call before (so once a step,
whose layers all have the same), and cannot be captured in a CUDA graph.

Letters: B batch, S slots, H query heads, L kv_lora_rank, P rotated width, N pages, Z slots of a page.
"""

# mypy: disable-error-code="import-not-found"

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from modeling.kernels.decode_kernels import check_capture
from modeling.refusal import Refusal

WORKSPACE_BYTES = 128 * 2**20  # of partial sums; what its documentation begins with
LONGEST_PAGE = 64


def decode(
    q_latent_BHL: Tensor,
    q_rope_BHP: Tensor | None,
    latent_BSL: Tensor,
    k_rope_BSP: Tensor | None,
    lengths_B: Tensor,
    latent_scale_BS: Tensor | None,
    scale: float,
) -> Tensor:
    """As `latent_decode`. Raises Refusal for caches whose rows are not equally far apart, and inside a capture."""
    assert q_rope_BHP is not None and k_rope_BSP is not None and latent_scale_BS is None
    if q_latent_BHL.is_cuda and torch.cuda.is_current_stream_capturing():
        check_capture("flashinfer")
    wrapper, caches = planned(q_latent_BHL, latent_BSL, k_rope_BSP, lengths_B, scale)
    return run(wrapper, q_latent_BHL, q_rope_BHP, caches)


def planned(
    q_latent_BHL: Tensor, latent_BSL: Tensor, k_rope_BSP: Tensor, lengths_B: Tensor, scale: float
) -> tuple[Any, list[Tensor]]:
    """(FlashInfer's wrapper, planned for rows of these lengths; both caches as pages). Waits for the lengths."""
    caches, apart = as_pages(latent_BSL, k_rope_BSP)
    S = latent_BSL.shape[1]
    plans = _plans(latent_BSL.device)
    plans.make(
        lengths=tuple(min(length, S) for length in lengths_B.tolist()),
        apart=apart,
        page=caches[0].shape[1],
        heads=q_latent_BHL.shape[1],
        widths=(latent_BSL.shape[2], k_rope_BSP.shape[2]),
        scale=scale,
        dtype=q_latent_BHL.dtype,
    )
    return plans.wrapper, caches


def run(wrapper: Any, q_latent_BHL: Tensor, q_rope_BHP: Tensor, caches: list[Tensor]) -> Tensor:
    """out_BHL by a plan that is made."""
    q_nope, q_pe = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_latent_BHL, q_rope_BHP))
    return wrapper.run(q_nope=q_nope, q_pe=q_pe, ckv_cache=caches[0], kpe_cache=caches[1])


def as_pages(*caches_BSX: Tensor) -> tuple[list[Tensor], int]:
    """(caches as (N, Z, X), views of the same memory; pages from one row to the next). Raises Refusal for uneven rows."""
    strides = [x.stride() for x in caches_BSX]
    slots = {per_row // per_slot if per_row % per_slot == 0 else 0 for per_row, per_slot, _ in strides}
    B, S = caches_BSX[0].shape[:2]
    if B == 1:  # nothing follows the one row
        slots = {S}
    if len(slots) != 1 or 0 in slots or any(per_element != 1 for _, _, per_element in strides):
        raise Refusal(
            "attention.kernel=flashinfer reads latents and rotated keys whose rows are equally many slots apart, and the "
            f"strides here are {' and '.join(map(str, strides))}; take attention.kernel=torch"
        )
    (apart,) = slots
    page = math.gcd(apart, LONGEST_PAGE)
    pages = (B - 1) * (apart // page) + -(-S // page)
    return [x.as_strided((pages, page, x.shape[2]), (page * x.stride(1), x.stride(1), 1)) for x in caches_BSX], apart // page


class _Plans:
    """FlashInfer's wrapper on a device, and what it is planned for."""

    def __init__(self, device: torch.device) -> None:
        from flashinfer.mla import BatchMLAPagedAttentionWrapper

        hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
        self.device, self.planned_for = device, None
        workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self.wrapper: Any = BatchMLAPagedAttentionWrapper(workspace, backend="fa3" if hopper else "fa2")

    def make(
        self,
        *,
        lengths: tuple[int, ...],
        apart: int,
        page: int,
        heads: int,
        widths: tuple[int, int],
        scale: float,
        dtype: torch.dtype,
    ) -> None:
        """Plan for rows of these lengths, unless that is what it is planned for."""
        wanted: Any = (lengths, apart, page, heads, widths, scale, dtype)
        if wanted == self.planned_for:
            return
        lengths_B = torch.tensor(lengths, dtype=torch.int32)
        first_B1 = torch.arange(len(lengths)) * apart
        used_B = (lengths_B + page - 1) // page
        table_BN = first_B1[:, None] + torch.arange(int(used_B.max()))
        pages = table_BN[torch.arange(table_BN.shape[1]) < used_B[:, None]].int()
        ends = torch.cat((torch.zeros(1, dtype=torch.int32), used_B.cumsum(0).int()))
        self.wrapper.plan(
            qo_indptr=torch.arange(len(lengths) + 1, dtype=torch.int32).to(self.device),
            kv_indptr=ends.to(self.device),
            kv_indices=pages.to(self.device),
            kv_len_arr=lengths_B.to(self.device),
            num_heads=heads,
            head_dim_ckv=widths[0],
            head_dim_kpe=widths[1],
            page_size=page,
            causal=False,
            sm_scale=scale,
            q_data_type=dtype,
            kv_data_type=dtype,
        )
        self.planned_for = wanted


@functools.cache
def _plans(device: torch.device) -> _Plans:
    return _Plans(device)
