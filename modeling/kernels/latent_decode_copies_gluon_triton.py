"""What Hopper's copy engine reads of a cache, and how it is told: of the two decode kernels in Gluon."""

from __future__ import annotations

from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from modeling.refusal import Refusal


def check_copied(latent_BSL: Tensor, k_rope_BSP: Tensor) -> None:
    """Raise Refusal for caches that the copy engine cannot read."""
    for name, cache in (("latents", latent_BSL), ("rotated keys", k_rope_BSP)):
        if not is_copied(cache):
            raise Refusal(
                f"the kernels in Gluon copy slots that begin at multiples of 16 bytes, and the {name} begin at "
                f"{cache.data_ptr()} with strides {cache.stride()} of {cache.itemsize} bytes; take attention.kernel=triton"
            )


def is_copied(x: Tensor) -> bool:
    """Whether the copy engine reads blocks of a three-dimensional tensor: rows that are whole, at multiples of 16 bytes."""
    between = [stride for stride, size in zip(x.stride()[:2], x.shape[:2], strict=True) if size > 1]
    return x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(stride * x.itemsize % 16 == 0 for stride in between)


def descriptor(x: Tensor, block_shape: list[int]) -> TensorDescriptor:
    """What the copy engine is told of a three-dimensional tensor of 16 bits, to copy such blocks of it."""
    # A dimension of one row may have any stride in torch; the copy engine checks it all the same.
    strides = [stride if size > 1 else x.shape[-1] for stride, size in zip(x.stride()[:2], x.shape[:2], strict=True)]
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)
    return TensorDescriptor(x, list(x.shape), [*strides, 1], block_shape, layout)
