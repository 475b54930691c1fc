"""The kernels beside torch's, to decode and for the gated delta rule: what each needs and takes, and the choice.

A further one that decodes is a file with a function `decode` and an entry of the table; each is imported only when chosen.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.torch_version import TorchVersion

from modeling.kernels.availability import TRITON_DTYPES, runs_gluon, runs_triton
from modeling.refusal import Refusal

EIGHT_BITS = (torch.int8, torch.float8_e4m3fn)  # of latents, with one scale a slot


@dataclass(frozen=True)
class Kernel:
    """A kernel beside torch's: where it stands, what it needs and what it takes.

    file: in modeling/kernels; for a new token with a function `decode`, whose arguments latent_decode.py and attend_decode.py
    give. package: that it imports; install: how to get that. dtypes: of queries and latents, or queries, keys
    and values.
    latents, rotated: widths L and P; keys: of a head, K (of EXPLICIT V too); equal_widths: V must be equal to it.
    capability: of one in Gluon, the major compute capability it is for; None: all. reads_8_bits: latents as they are stored.
    auto: it is taken where it can run and nobody chose, before kernels that stand above it in the table.
    interpreted: TRITON_INTERPRET runs it on any device. plans_on_host: each step anew, so that no CUDA graph can hold it.
    mended_by: the package that takes Triton's place in gradients which Triton 3.4 to 3.7.0 compiles wrongly on Hopper.
    """

    file: str
    package: str
    install: str
    dtypes: Sequence[torch.dtype]
    latents: Sequence[int] = ()
    rotated: Sequence[int] = ()
    keys: Sequence[int] = ()
    equal_widths: bool = False
    capability: int | None = None
    auto: bool = False
    reads_8_bits: bool = False
    interpreted: bool = False
    plans_on_host: bool = False
    mended_by: str | None = None

    @property
    def decode(self) -> Callable[..., torch.Tensor]:
        return _decode(self.file)


@functools.cache
def _decode(file: str) -> Callable[..., torch.Tensor]:
    return importlib.import_module(f"modeling.kernels.{file}").decode


HALF_PRECISION = (torch.bfloat16, torch.float16)
TRITON = "pip install -r requirements-kernels.txt"
OTHERS = {
    "triton": Kernel(
        "latent_decode_triton",
        "triton",
        TRITON,
        TRITON_DTYPES,
        range(1, 513),
        range(65),
        auto=True,
        reads_8_bits=True,
        interpreted=True,
    ),
    # On an H200 1.1 to 2.1 times as fast as Triton's in 16 bits and 1.1 to 4.5 times in 8 (docs/PERFORMANCE.md), but for one
    # row of 1,024 tokens with 16 heads in 16 bits, 7.9 us for 7.3.
    "gluon": Kernel(
        "latent_decode_gluon_triton",
        "triton.experimental.gluon",
        TRITON,
        HALF_PRECISION,
        (512,),
        (64,),
        capability=9,
        auto=True,
        reads_8_bits=True,
    ),
    "flashinfer": Kernel(
        "latent_decode_flashinfer",
        "flashinfer",
        "pip install flashinfer-python",
        HALF_PRECISION,
        (128, 256, 512),
        (64,),
        plans_on_host=True,
    ),
}
# Of gated DeltaNet's layers: every call, training included; triton's of more than one token. A name in both tables needs the
# same of a machine in both.
DELTA_RULES = {
    "triton": Kernel(
        "delta_rule_triton",
        "triton",
        TRITON,
        HALF_PRECISION,
        keys=(32, 64),  # measured on a GPU, where unequal widths were wrong: docs/LOG.md
        equal_widths=True,
        auto=True,
        interpreted=True,
    ),
    "fla": Kernel(
        "delta_rule_fla", "fla", 'pip install "fla-core>=0.6"', HALF_PRECISION, keys=range(1, 257), mended_by="tilelang"
    ),
}
# Of one new token over explicit keys and values.
EXPLICIT = {
    "triton": Kernel("attend_decode_triton", "triton", TRITON, TRITON_DTYPES, keys=range(1, 257), interpreted=True, auto=True)
}
_TABLE = OTHERS | DELTA_RULES | EXPLICIT
KERNELS = ("auto", "torch", *_TABLE)


def check_kernel(name: str, device: torch.device | str) -> None:
    """Raise Refusal, with the remedy, if attention.kernel=name cannot run on this device."""
    if name not in KERNELS:
        raise Refusal(f"attention.kernel={name} is unknown; choose {', '.join(KERNELS[:-1])} or {KERNELS[-1]}")
    kernel = _TABLE.get(name)
    if kernel is None:
        return
    device = torch.device(device)
    kind = "rocm" if device.type == "cuda" and torch.version.hip else device.type  # torch gives both one name
    if kind != "cuda" and not _is_interpreted(kernel):
        raise Refusal(f"attention.kernel={name} needs a CUDA device and this one is {kind}; take attention.kernel=torch")
    if not _is_installed(kernel.package):
        raise Refusal(
            f"attention.kernel={name} needs the package {kernel.package}: {kernel.install}, or take attention.kernel=torch"
        )
    if kernel.capability is not None and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(device)
        if major != kernel.capability:
            raise Refusal(
                f"attention.kernel={name} is for devices of compute capability {kernel.capability} and this one has "
                f"{major}.{minor}; take attention.kernel=triton"
            )


def _is_interpreted(kernel: Kernel) -> bool:
    as_triton_reads_it = ("1", "true", "on", "yes", "y")
    return kernel.interpreted and os.environ.get("TRITON_INTERPRET", "").lower() in as_triton_reads_it


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # one that it would be in is missing
        return False


def check_dtype(name: str, dtype: torch.dtype, kernels: Mapping[str, Kernel] = OTHERS) -> None:
    """Raise Refusal if a kernel of a table does not compute in this type, or Triton's interpreter would do so wrongly."""
    known = kernels[name].dtypes
    if dtype == torch.bfloat16 and _is_interpreted(kernels[name]):  # whose numbers it multiplies as integers
        raise Refusal(
            f"attention.kernel={name} with TRITON_INTERPRET is wrong in {dtype}: decode in float32 or float16 "
            f"(cache.dtype=float32), or take attention.kernel=torch"
        )
    if dtype not in known:
        *names, last = (str(each).removeprefix("torch.") for each in known)
        raise Refusal(
            f"attention.kernel={name} computes in {', '.join(names)} or {last}, not in {dtype}; take attention.kernel=torch"
        )


def check_gradient(name: str, device: torch.device) -> None:
    """Raise Refusal if nothing can be trained with attention.kernel=name on this device, for which it is a kernel."""
    kernel = DELTA_RULES.get(name)
    if kernel is None or kernel.mended_by is None or _is_installed(kernel.mended_by):
        return
    triton = TorchVersion(importlib.metadata.version("triton"))
    if torch.cuda.get_device_capability(device)[0] == 9 and "3.4" <= triton < "3.7.1":
        raise Refusal(
            f"attention.kernel={name} has no right gradient on Hopper with Triton {triton} (fla-org/flash-linear-attention, "
            f"issue 640): train with Triton 3.7.1, install {kernel.mended_by}, or take attention.kernel=torch"
        )


def check_no_gradient(name: str, *tensors: torch.Tensor | None) -> None:
    """Raise Refusal if a kernel that decodes with attention.kernel=name would have to pass a gradient to one of these."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors if x is not None):
        raise Refusal(
            f"attention.kernel={name} has no backward pass: decode under torch.no_grad(), or take attention.kernel=torch"
        )


def check_capture(name: str) -> None:
    """Raise Refusal if a step with attention.kernel=name cannot be a CUDA graph."""
    if name in OTHERS and OTHERS[name].plans_on_host:
        raise Refusal(
            f"attention.kernel={name} plans each step on the host, which no CUDA graph can hold (step=graph, and auto on "
            "CUDA); take step=eager or attention.kernel=triton"
        )


def check_widths(name: str, kv_lora_rank: int, qk_rope_head_dim: int) -> None:
    """Raise Refusal if a kernel of the table has nothing for a latent and a rotated key of these widths."""
    kernel = OTHERS[name]
    if kv_lora_rank not in kernel.latents or qk_rope_head_dim not in kernel.rotated:
        raise Refusal(
            f"attention.kernel={name} takes kv_lora_rank {_in_words(kernel.latents)} and qk_rope_head_dim "
            f"{_in_words(kernel.rotated)}, not {kv_lora_rank} and {qk_rope_head_dim}; take attention.kernel=torch"
        )


def lacks_heads(name: str, K: int, V: int) -> str | None:
    """Why a kernel of DELTA_RULES is not for keys and values of these widths, as the middle of a sentence; None: it is."""
    kernel = DELTA_RULES[name]
    if K not in kernel.keys:
        return f"takes heads of {_in_words(kernel.keys)} dimensions, and this variant's head_dim is {K}:"
    if kernel.equal_widths and V != K:
        return f"takes values as wide as heads, and this variant's v_head_dim is {V}, its head_dim {K}:"
    return None


def select_rule(name: str, *, device: torch.device, dtype: torch.dtype, K: int, V: int) -> str:
    """What computes the gated delta rule, of more than one token: auto is a kernel of DELTA_RULES where one can, else torch.

    dtype: of the products.
    """
    if name != "auto":
        return name
    for other, kernel in DELTA_RULES.items():
        if kernel.auto and runs_triton(device, dtype) and dtype in kernel.dtypes and lacks_heads(other, K, V) is None:
            return other
    return "torch"


def explicit_kernels(K: int, V: int) -> dict[str, str | None]:
    """What else than torch computes one new token over keys and values of these widths, each with why it does not, or None."""
    lacks = f"takes keys and values up to {{most}} wide, and this variant's are {K} and {V}:"
    return {name: None if max(K, V) in kernel.keys else lacks.format(most=kernel.keys[-1]) for name, kernel in EXPLICIT.items()}


def select_explicit(name: str, *, device: torch.device, dtype: torch.dtype, K: int, V: int) -> str:
    """What computes one new token over explicit keys and values of this type: auto is the last of EXPLICIT that can.

    Where none can it is torch, in which alone a gradient is possible.
    """
    if name != "auto":
        return name
    chosen = "torch"
    if runs_triton(device, dtype) and not torch.is_grad_enabled():
        for other, lacks in explicit_kernels(K, V).items():
            if EXPLICIT[other].auto and lacks is None and dtype in EXPLICIT[other].dtypes:
                chosen = other
    return chosen


def _in_words(widths: Sequence[int]) -> str:
    if isinstance(widths, range):
        return f"up to {widths[-1]}"
    return " or ".join(map(str, widths))


def select_kernel(
    name: str, *, device: torch.device, dtype: torch.dtype, latent_width: int, qk_rope_head_dim: int, window: int | None = None
) -> str:
    """auto is a kernel of the table where one can compute a call of one new token, and torch elsewhere; another name stays.

    Of several it is the last in the table: gluon on Hopper, else triton. dtype: of the cached latents as they are read, and of
    the queries where those have 8 bits. A gradient is possible in torch alone.
    """
    if name != "auto":
        return name
    chosen = "torch"
    if not runs_triton(device, dtype) or window is not None or torch.is_grad_enabled():
        return chosen
    for other, kernel in OTHERS.items():
        fits = kernel.auto and dtype in kernel.dtypes and latent_width in kernel.latents and qk_rope_head_dim in kernel.rotated
        if fits and (kernel.capability is None or runs_gluon(device, kernel.capability)):
            chosen = other
    return chosen
