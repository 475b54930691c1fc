"""Speed of the latent decode kernel against its ceilings and its peers: python benchmarks/latent_decode.py [key=value ...].

  --offline   compile the kernel for Hopper on a machine without a GPU: registers, spills, shared memory, instructions

A call is timed inside a CUDA graph, so the host's time does not count; calls take turns on so many inputs that L2 (50 to
60 MB) cannot hold the next one. Of memory: the bytes that must move (cache, queries, result), each once, against the
read and copy bandwidth measured in the same run. Of arithmetic: 2 B H S (2 L + P) FLOP against a measured 8192^3 matrix
product. The error is ||out - exact|| / ||exact|| on the first row, exact in float64.
Letters: B batch, S slots, H heads, L kv_lora_rank, P rotated width, I the inputs in turn.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.entry.bootstrap import enter_environment

enter_environment()

import functools
import gc
import inspect
import json
import re
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from harness.entry.cli import parse_options, run_script
from harness.errors import UserError, as_user_error
from harness.runs.provenance import commit
from modeling.attention.quantisation import quantise
from modeling.compiling import compile_each
from modeling.kernels.decode_kernels import check_kernel, check_widths
from modeling.kernels.latent_decode import latent_decode

HOPPER_SHARED_BYTES = 228 * 1024  # of one multiprocessor; a program takes 1 KiB more than it asks for
HOPPER_REGISTERS = 65_536


@dataclass
class LatentDecodeOptions:
    heads: str = "16,128"
    batch_sizes: str = "1,32,128"
    contexts: Annotated[str, "cached tokens of every row"] = "1024,8192,32768"
    kv_lora_rank: int = 512
    qk_rope_head_dim: int = 64
    dtype: Annotated[str, "bfloat16, float16 or float32"] = "bfloat16"
    kernels: Annotated[
        str,
        "all, or some of triton,gluon (each also with _int8 and _fp8: latents that are stored so, with a scale a slot, the "
        "rotated key in 16 bits), torch,torch_compiled,sdpa,flashinfer,flash_mla,fa3,fa3_vllm,vllm,sglang (the last six where "
        "they are installed)",
    ] = "all"
    rounds: Annotated[int, "timed replays; a figure is their median with the range"] = 10
    tile: Annotated[str | None, "heads,slots,warps,stages,registers in place of the table's choice, for tuning"] = None
    splits: Annotated[int | None, "ranges a row in place of the table's choice and of FlashAttention-3's"] = None
    out: Annotated[str | None, "a JSON file for the figures"] = None


@dataclass(frozen=True)
class Ceilings:
    """Measured here: bytes per second read, bytes per second read and written by a copy, bf16 FLOP per second."""

    read: float
    copy: float
    matmul: float


@dataclass(frozen=True)
class KernelTime:
    """One kernel on one shape; microseconds per call over the rounds."""

    kernel: str
    plan: str
    heads: int
    batch_size: int
    context: int
    median: float
    low: float
    high: float
    bytes_per_second: float
    of_read: float
    flops_per_second: float
    of_matmul: float
    error: float


@dataclass(eq=False)
class Case:
    """One shape with its inputs: I of everything, all rows S tokens long."""

    q_latent_IBHL: Tensor
    q_rope_IBHP: Tensor | None
    latent_IBSL: Tensor
    k_rope_IBSP: Tensor | None
    lengths_B: Tensor
    scale: float

    @property
    def inputs(self) -> int:
        return len(self.latent_IBSL)

    @functools.cache  # noqa: B019 - a case ends with its shape
    def quantised(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(latent_IBSL in 8 bits, the scale of each slot)."""
        payloads, scales = zip(*(quantise(latent_BSL, dtype) for latent_BSL in self.latent_IBSL), strict=True)
        return torch.stack(payloads), torch.stack(scales)

    def arguments(self, i: int) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor]:
        """What `latent_decode` takes, of input i."""
        q_rope = None if self.q_rope_IBHP is None else self.q_rope_IBHP[i]
        k_rope = None if self.k_rope_IBSP is None else self.k_rope_IBSP[i]
        return self.q_latent_IBHL[i], q_rope, self.latent_IBSL[i], k_rope, self.lengths_B

    @functools.cached_property
    def joint(self) -> tuple[Tensor, Tensor]:
        """(q_IBHK, kv_IBSK), K = L + P: the layout of kernels that keep both parts in one buffer."""
        if self.q_rope_IBHP is None or self.k_rope_IBSP is None:
            return self.q_latent_IBHL, self.latent_IBSL
        q_IBHK = torch.cat((self.q_latent_IBHL, self.q_rope_IBHP), dim=-1)
        return q_IBHK, torch.cat((self.latent_IBSL, self.k_rope_IBSP), dim=-1)

    @functools.cached_property
    def paged(self) -> tuple[Tensor, Tensor, Tensor]:
        """(kv_INZ1K, table_BN, lengths_B): `joint` in pages of 64 slots. Raises ValueError where the last one is not full."""
        _, kv_IBSK = self.joint
        _, B, S, K = kv_IBSK.shape
        if S % 64:
            raise ValueError("the context must be a multiple of the page, 64 slots")
        table_BN = torch.arange(B * S // 64, dtype=torch.int32, device=kv_IBSK.device).view(B, S // 64)
        return kv_IBSK.view(-1, B * S // 64, 64, 1, K), table_BN, self.lengths_B.int()


Call = Callable[[int], Tensor]  # the number of an input -> out_BHL


def main(arguments: list[str]) -> int:
    if "--offline" in arguments:
        return compile_offline()
    options = parse_options(LatentDecodeOptions, arguments)
    dtypes = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if options.dtype not in dtypes:
        raise UserError(f"dtype={options.dtype} is unknown; choose {', '.join(dtypes)}")
    names = list(KERNELS) if options.kernels == "all" else options.kernels.split(",")
    for name in names:
        if name not in KERNELS:
            raise UserError(f"kernels={name} is unknown; choose all or some of {','.join(KERNELS)}")
    heads, batch_sizes, contexts = (
        positive_numbers(key, getattr(options, key)) for key in ("heads", "batch_sizes", "contexts")
    )
    if options.tile is not None and len(positive_numbers("tile", options.tile)) != 5:
        raise UserError(f"tile={options.tile} must be five numbers: heads,slots,warps,stages,registers")
    if not torch.cuda.is_available():
        raise UserError(
            "this benchmark needs a CUDA device; python benchmarks/latent_decode.py --offline compiles the kernel without"
        )
    with as_user_error():
        check_widths("triton", options.kv_lora_rank, options.qk_rope_head_dim)
        if any(name.startswith("triton") for name in names):
            check_kernel("triton", "cuda")

    device = torch.device("cuda", torch.cuda.current_device())
    ceilings = measure_ceilings(device)
    figures: list[KernelTime] = []
    remarks: list[str] = []
    failed = False
    shapes = [(H, B, S) for H in heads for B in batch_sizes for S in contexts]
    bar = tqdm(total=len(shapes) * len(names), disable=None)
    for H, B, S in shapes:
        case = make_case(options, H, B, S, dtypes[options.dtype], device)
        if case is None:
            remarks.append(f"{H} heads, batch {B}, context {S}: skipped, its inputs do not fit into the device's memory")
            bar.update(len(names))
            continue
        exact = exact_first_row(case)
        for name in names:
            torch.compiler.reset()  # one graph a shape, never a dynamic one made from several
            try:
                call, plan = KERNELS[name](case, options)
                error = float((call(0)[0].double() - exact).norm() / exact.norm())
                times = timed(call, case.inputs, options.rounds)
                figures.append(kernel_time(name, plan, case, times, ceilings, error))
                bar.write(row(figures[-1]))
            except ImportError as missing:
                remarks.append(f"{name}: not installed ({missing})")
            except (RuntimeError, ValueError, TypeError) as reason:  # a peer that does not take this shape, or no memory
                remarks.append(f"{name}, {H} heads, batch {B}, context {S}: {kind_and_message(reason)}")
            gc.collect()
            torch.cuda.empty_cache()
            bar.update()
        del case
        gc.collect()
        torch.cuda.empty_cache()
    bar.close()
    print_report(figures, remarks, ceilings, options, device)
    return int(failed)


def positive_numbers(key: str, text: str) -> list[int]:
    """Of a list with commas, in which a number may come twice."""
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise UserError(f"{key}={text} must be positive whole numbers, separated by commas")
    return [int(number) for number in text.split(",")]


def kind_and_message(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:160]}"


def make_case(options: LatentDecodeOptions, H: int, B: int, S: int, dtype: torch.dtype, device: torch.device) -> Case | None:
    """Random inputs, at least two and four times L2 together; None if they do not fit with what the kernels add."""
    L, P = options.kv_lora_rank, options.qk_rope_head_dim
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    one = B * S * (L + P) * dtype.itemsize
    inputs = max(2, -(-4 * l2 // one))
    logits = B * H * S * 4
    needed = 2 * inputs * one + 4 * logits  # twice: the joint buffers of the peers; logits, masked, weights in torch
    if needed > 0.9 * torch.cuda.mem_get_info(device)[0]:
        return None
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator)

    return Case(
        normal(inputs, B, H, L),
        normal(inputs, B, H, P) if P else None,
        normal(inputs, B, S, L),
        normal(inputs, B, S, P) if P else None,
        torch.full((B,), S, device=device),
        (L + P) ** -0.5,
    )


def exact_first_row(case: Case) -> Tensor:
    """out_HL of row 0 of input 0 in float64."""
    first = [None if x is None else x[:1].double() for x in case.arguments(0)[:4]]
    q_latent, q_rope, latent, k_rope = first
    assert q_latent is not None and latent is not None
    return latent_decode(q_latent, q_rope, latent, k_rope, case.lengths_B[:1], scale=case.scale)[0]


def timed(call: Call, inputs: int, rounds: int) -> list[float]:
    """Microseconds per call in each round; a round is one replay of a graph that goes through the inputs."""
    calls = inputs * -(-4 // inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compilation and first allocations, not to be captured
        for i in range(min(inputs, 3)):
            call(i)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(i % inputs)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for round_number in range(rounds + 2):  # the first two warm up
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if round_number >= 2:
            times.append(start.elapsed_time(end) * 1000 / calls)
    return times


def measure_ceilings(device: torch.device) -> Ceilings:
    """The best of ten of each, over 2 GiB: far more than L2 holds."""
    rows = torch.empty(2**15, 2**15, dtype=torch.bfloat16, device=device).normal_()
    numbers = rows.view(torch.float32)
    vector = torch.ones(2**15, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(rows)
    reads = min(best_seconds(lambda: numbers.sum()), best_seconds(lambda: torch.mv(rows, vector)))
    copies = best_seconds(lambda: target.copy_(rows))
    a, b = (torch.empty(8192, 8192, dtype=torch.bfloat16, device=device).normal_() for _ in range(2))
    matmul = best_seconds(lambda: a @ b)
    return Ceilings(read=rows.nbytes / reads, copy=2 * rows.nbytes / copies, matmul=2 * 8192**3 / matmul)


def best_seconds(function: Callable[[], Tensor]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(13):  # three warm up
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return min(times[3:])


def ours(case: Case, options: LatentDecodeOptions, *, stored: torch.dtype | None = None) -> tuple[Call, str]:
    from modeling.kernels import latent_decode_triton as kernel

    latents = case.latent_IBSL if stored is None else case.quantised(stored)[0]
    plan = kernel.plan_for(case.q_latent_IBHL[0], latents[0])
    tile, splits = plan.tile, options.splits or plan.splits
    if options.tile is not None:
        tile = kernel.Tile(*positive_numbers("tile", options.tile), resident=1)
        if options.splits is None:
            query, latent = case.q_latent_IBHL[0], latents[0]
            splits = kernel.choose_splits(
                batch_size=latent.shape[0],
                slots=latent.shape[1],
                n_heads=query.shape[1],
                tile=tile,
                multiprocessors=torch.cuda.get_device_properties(latent.device).multi_processor_count,
            )
    plan = kernel.Plan(tile, splits)
    name = f"{tile.heads}x{tile.slots} w{tile.warps} s{tile.stages} /{splits}"

    def call(i: int) -> Tensor:
        q_latent_BHL, q_rope_BHP, latent_BSL, k_rope_BSP, lengths_B = case.arguments(i)
        scale_BS = None
        if stored is not None:
            latent_BSL, scale_BS = (each[i] for each in case.quantised(stored))
        return kernel.launch(q_latent_BHL, q_rope_BHP, latent_BSL, k_rope_BSP, lengths_B, scale_BS, scale=case.scale, plan=plan)

    return call, name


def gluon(case: Case, options: LatentDecodeOptions, *, stored: torch.dtype | None = None) -> tuple[Call, str]:
    from modeling.kernels import latent_decode_gluon_triton as kernel
    from modeling.kernels.latent_decode_triton import splits_for

    check_kernel("gluon", case.latent_IBSL.device)
    check_widths("gluon", options.kv_lora_rank, options.qk_rope_head_dim)
    latents, scales = (case.latent_IBSL, None) if stored is None else case.quantised(stored)
    _, tile = kernel.form_for(case.q_latent_IBHL[0], latents[0])
    splits = options.splits or splits_for(case.q_latent_IBHL[0], latents[0], tile)

    def call(i: int) -> Tensor:
        q_latent_BHL, q_rope_BHP, _, k_rope_BSP, lengths_B = case.arguments(i)
        assert q_rope_BHP is not None and k_rope_BSP is not None
        caches = latents[i], k_rope_BSP, lengths_B, None if scales is None else scales[i]
        return kernel.launch(q_latent_BHL, q_rope_BHP, *caches, scale=case.scale, splits=splits)

    return call, f"{tile.heads}x{tile.slots} /{splits}"


def torch_eager(case: Case, options: LatentDecodeOptions) -> tuple[Call, str]:
    return lambda i: latent_decode(*case.arguments(i), scale=case.scale), ""


def torch_compiled(case: Case, options: LatentDecodeOptions) -> tuple[Call, str]:
    compiled = compile_each(latent_decode, fullgraph=True)
    return lambda i: compiled(*case.arguments(i), scale=case.scale), ""


def sdpa(case: Case, options: LatentDecodeOptions) -> tuple[Call, str]:
    """The heads as queries of one head; of the fused kernels whichever takes keys of L + P (flash ends at 256)."""
    q_IBHK, kv_IBSK = case.joint
    L = case.latent_IBSL.shape[-1]

    def call(i: int) -> Tensor:
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
            return F.scaled_dot_product_attention(
                q_IBHK[i].unsqueeze(1), kv_IBSK[i].unsqueeze(1), kv_IBSK[i, :, :, :L].unsqueeze(1), scale=case.scale
            ).squeeze(1)

    return call, ""


def flashinfer(case: Case, options: LatentDecodeOptions) -> tuple[Call, str]:
    """FlashInfer's kernel over our own caches; its plan is made beforehand and not timed."""
    from modeling.kernels import latent_decode_flashinfer as kernel

    check_widths("flashinfer", options.kv_lora_rank, options.qk_rope_head_dim)
    caches = []
    for i in range(case.inputs):
        q_latent_BHL, _, latent_BSL, k_rope_BSP, lengths_B = case.arguments(i)
        assert k_rope_BSP is not None
        wrapper, pages = kernel.planned(q_latent_BHL, latent_BSL, k_rope_BSP, lengths_B, case.scale)
        caches.append(pages)

    def call(i: int) -> Tensor:
        q_latent_BHL, q_rope_BHP, *_ = case.arguments(i)
        assert q_rope_BHP is not None
        return kernel.run(wrapper, q_latent_BHL, q_rope_BHP, caches[i])

    return call, f"pages of {caches[0][0].shape[1]}"


def flash_mla(case: Case, options: LatentDecodeOptions) -> tuple[Call, str]:
    """DeepSeek's kernel over pages of 64 slots, both parts in one buffer; its schedule is made at the first call, not timed."""
    from flash_mla import flash_mla_with_kvcache, get_mla_metadata

    q_IBHK, _ = case.joint
    kv_INZ1K, table_BN, lengths_B = case.paged
    L = case.latent_IBSL.shape[-1]
    schedule = get_mla_metadata(lengths_B, q_IBHK.shape[2], 1)
    # SGLang's wheel of it keeps the kernels for Hopper under this name.
    extra = {"use_legacy": True} if "use_legacy" in inspect.signature(flash_mla_with_kvcache).parameters else {}

    def call(i: int) -> Tensor:
        out_B1HL, _ = flash_mla_with_kvcache(
            q_IBHK[i].unsqueeze(1), kv_INZ1K[i], table_BN, lengths_B, L, *schedule, softmax_scale=case.scale, **extra
        )
        return out_B1HL.squeeze(1)

    return call, ""


def fa3(case: Case, options: LatentDecodeOptions) -> tuple[Call, str]:
    """FlashAttention-3 over our own caches: latents as values, and a second query against them beside the rotated one.

    From its authors' build or the wheel fa3-fwd, which has no pages. Its schedule is made beforehand and not timed.
    """
    try:
        from flash_attn_interface import flash_attn_with_kvcache, get_scheduler_metadata
    except ImportError:
        from fa3_fwd_interface import flash_attn_with_kvcache, get_scheduler_metadata

    B, H, S, L, P = fa3_sizes(case)
    lengths_B, splits = case.lengths_B.int(), options.splits or 0
    kinds = {"qkv_dtype": case.latent_IBSL.dtype, "headdim_v": L, "num_splits": splits}
    schedule = get_scheduler_metadata(B, 1, S, H, 1, P, lengths_B, **kinds)

    def call(i: int) -> Tensor:
        q_latent_BHL, q_rope_BHP, latent_BSL, k_rope_BSP, _ = case.arguments(i)
        assert q_rope_BHP is not None and k_rope_BSP is not None
        q_B1HP, qv_B1HL = q_rope_BHP.unsqueeze(1), q_latent_BHL.unsqueeze(1)
        return flash_attn_with_kvcache(
            q_B1HP,
            k_rope_BSP.unsqueeze(2),
            latent_BSL.unsqueeze(2),
            qv=qv_B1HL,
            cache_seqlens=lengths_B,
            softmax_scale=case.scale,
            scheduler_metadata=schedule,
            num_splits=splits,
        ).squeeze(1)

    return call, f"/{splits}" if splits else ""


def fa3_vllm(case: Case, options: LatentDecodeOptions) -> tuple[Call, str]:
    """vLLM's build of FlashAttention-3 over pages of 64 slots, both parts in one buffer, called as its MLA backend does.

    Its schedule is made beforehand and not timed.
    """
    from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

    B, H, S, L, P = fa3_sizes(case)
    kv_INZ1K, table_BN, lengths_B = case.paged
    starts, splits = torch.arange(B + 1, dtype=torch.int32, device=lengths_B.device), options.splits or 0
    kinds = {"qkv_dtype": kv_INZ1K.dtype, "headdim_v": L, "page_size": 64, "cu_seqlens_q": starts, "num_splits": splits}
    schedule = get_scheduler_metadata(B, 1, S, H, 1, P, lengths_B, causal=True, **kinds)

    def call(i: int) -> Tensor:
        return flash_attn_varlen_func(
            q=case.arguments(i)[1],
            k=kv_INZ1K[i, ..., L:],
            v=kv_INZ1K[i, ..., :L],
            q_v=case.q_latent_IBHL[i],
            max_seqlen_q=1,
            cu_seqlens_q=starts,
            max_seqlen_k=S,
            seqused_k=lengths_B,
            block_table=table_BN,
            softmax_scale=case.scale,
            causal=True,
            fa_version=3,
            scheduler_metadata=schedule,
            num_splits=splits,
        )

    return call, f"/{splits}" if splits else ""


def fa3_sizes(case: Case) -> tuple[int, int, int, int, int]:
    """(B, H, S, L, P). Raises ValueError where nothing is rotated: FlashAttention-3 has no key then."""
    if case.q_rope_IBHP is None:
        raise ValueError("FlashAttention-3 needs a rotated part as its key")
    (B, H, P), (S, L) = case.q_rope_IBHP.shape[1:], case.latent_IBSL.shape[2:]
    return B, H, S, L, P


def vllm(case: Case, options: LatentDecodeOptions) -> tuple[Call, str]:
    """vLLM's Triton kernel over pages of 64 slots, with the number of splits that its backend takes."""
    from vllm.v1.attention.ops.triton_decode_attention import decode_attention_fwd

    q_IBHK, _ = case.joint
    kv_INZ1K, table_BN, lengths_B = case.paged
    _, B, H, _ = q_IBHK.shape
    S, L = case.latent_IBSL.shape[2:]
    processors = torch.cuda.get_device_properties(q_IBHK.device).multi_processor_count
    splits = min(2 * processors, 2 ** max(0, (S // 512 - 1).bit_length()))
    partial = torch.empty(B, H, splits, L + 1, dtype=torch.float32, device=q_IBHK.device)
    lse = torch.empty(B, H, dtype=q_IBHK.dtype, device=q_IBHK.device)
    extra = {"is_mla": True} if "is_mla" in inspect.signature(decode_attention_fwd).parameters else {}

    def call(i: int) -> Tensor:
        out_BHL = torch.empty_like(case.q_latent_IBHL[i])
        cache = kv_INZ1K[i]
        decode_attention_fwd(
            q_IBHK[i], cache, cache[..., :L], out_BHL, lse, table_BN, lengths_B, partial, splits, case.scale, 64, **extra
        )
        return out_BHL

    return call, f"/{splits}"


def sglang(case: Case, options: LatentDecodeOptions) -> tuple[Call, str]:
    """SGLang's Triton kernel over single slots, 8 splits as by default there."""
    from sglang.srt.layers.attention.triton_ops.decode_attention import decode_attention_fwd

    q_IBHK, kv_IBSK = case.joint
    _, B, H, _ = q_IBHK.shape
    S, L = case.latent_IBSL.shape[2:]
    device, splits = q_IBHK.device, 8
    starts = torch.arange(B + 1, dtype=torch.int32, device=device) * S
    slots = torch.arange(B * S, dtype=torch.int64, device=device)
    partial = torch.empty(B, H, splits, L, dtype=torch.float32, device=device)
    lse = torch.empty(B, H, splits, dtype=torch.float32, device=device)
    splits_B = torch.full((B,), splits, dtype=torch.int32, device=device)
    parameters = inspect.signature(decode_attention_fwd).parameters
    extra = {name: 1.0 for name in ("k_scale", "v_scale") if name in parameters}

    def call(i: int) -> Tensor:
        out_BHL = torch.empty_like(case.q_latent_IBHL[i])
        cache = kv_IBSK[i].view(B * S, 1, -1)
        decode_attention_fwd(
            q_IBHK[i], cache, cache[..., :L], out_BHL, starts, slots, partial, lse, splits_B, splits, case.scale, **extra
        )
        return out_BHL

    return call, f"/{splits}"


EIGHT_BITS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}  # of latents
OURS: dict[str, Callable[..., tuple[Call, str]]] = {"triton": ours, "gluon": gluon}
STORED = {f"{kernel}_{name}": dtype for kernel in OURS for name, dtype in EIGHT_BITS.items()}
KERNELS: dict[str, Callable[[Case, LatentDecodeOptions], tuple[Call, str]]] = {
    **OURS,
    **{name: functools.partial(OURS[name.rpartition("_")[0]], stored=dtype) for name, dtype in STORED.items()},
    "torch": torch_eager,
    "torch_compiled": torch_compiled,
    "sdpa": sdpa,
    "flashinfer": flashinfer,
    "flash_mla": flash_mla,
    "fa3": fa3,
    "fa3_vllm": fa3_vllm,
    "vllm": vllm,
    "sglang": sglang,
}


def kernel_time(name: str, plan: str, case: Case, times: list[float], ceilings: Ceilings, error: float) -> KernelTime:
    """Times and what they mean."""
    q_latent, q_rope, latent, k_rope, lengths_B = case.arguments(0)
    B, H, L = q_latent.shape
    S, P = latent.shape[1], 0 if k_rope is None else k_rope.shape[-1]
    latents = [each[0] for each in case.quantised(STORED[name])] if name in STORED else [latent]
    moved = sum(x.nbytes for x in (q_latent, q_rope, *latents, k_rope, lengths_B) if x is not None) + q_latent.nbytes
    median = statistics.median(times)
    rate, flops = moved / (median * 1e-6), 2 * B * H * S * (2 * L + P) / (median * 1e-6)
    return KernelTime(
        kernel=name,
        plan=plan,
        heads=H,
        batch_size=B,
        context=S,
        median=median,
        low=min(times),
        high=max(times),
        bytes_per_second=rate,
        of_read=rate / ceilings.read,
        flops_per_second=flops,
        of_matmul=flops / ceilings.matmul,
        error=error,
    )


def row(f: KernelTime) -> str:
    """One line of the table."""
    return (
        f"{f.heads:>5}{f.batch_size:>6}{f.context:>8}  {f.kernel:<15}{f.plan:<20}{f.median:>10.1f}"
        f"{f'{f.low:.1f}-{f.high:.1f}':>20}{f.bytes_per_second / 1e9:>8.0f}{f.of_read:>7.0%}"
        f"{f.flops_per_second / 1e12:>9.1f}{f.of_matmul:>7.0%}{f.error:>10.1e}"
    )


def print_report(
    figures: list[KernelTime], remarks: list[str], ceilings: Ceilings, options: LatentDecodeOptions, device: torch.device
) -> None:
    """Remarks, JSON if asked for, and the table last."""
    machine = torch.cuda.get_device_name(device)
    if options.out is not None:
        record = {
            "options": asdict(options),
            "device": machine,
            "torch": torch.__version__,
            "triton": triton_version(),
            "commit": commit(),
            "ceilings": asdict(ceilings),
            "figures": [asdict(f) for f in figures],
            "remarks": remarks,
        }
        Path(options.out).write_text(json.dumps(record) + "\n", encoding="utf-8")
    for remark in dict.fromkeys(remarks):
        print(remark)
    print(
        f"{machine}, torch {torch.__version__}, triton {triton_version()}, {options.dtype}, {options.kv_lora_rank}+"
        f"{options.qk_rope_head_dim}; measured here: read {ceilings.read / 1e9:.0f} GB/s, copy {ceilings.copy / 1e9:.0f} "
        f"GB/s, bf16 matrix product {ceilings.matmul / 1e12:.0f} TFLOP/s"
    )
    print(
        f"{'heads':>5}{'batch':>6}{'context':>8}  {'kernel':<15}{'plan':<20}{'us':>10}{'range':>20}{'GB/s':>8}"
        f"{'read':>7}{'TFLOP/s':>9}{'peak':>7}{'error':>10}"
    )
    for each in figures:
        print(row(each))


def triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "not installed"
    return triton.__version__


# (heads, kv_lora_rank, qk_rope_head_dim, dtype): DeepSeek's shapes, then smaller and odd ones.
OFFLINE = (
    (128, 512, 64, "bf16"),
    (128, 512, 64, "fp16"),
    (16, 512, 64, "bf16"),
    (16, 512, 64, "fp32"),
    (24, 512, 0, "bf16"),
    (64, 384, 48, "bf16"),
    (64, 256, 32, "bf16"),
    (32, 128, 64, "bf16"),
    (12, 320, 64, "bf16"),
    (16, 256, 64, "bf16"),
    (12, 192, 32, "bf16"),
    (16, 128, 64, "bf16"),
    (8, 80, 16, "bf16"),
    (12, 256, 32, "fp32"),
    (16, 128, 64, "fp32"),
    (16, 512, 64, "int8"),
    (16, 512, 64, "fp8"),
    (128, 512, 64, "int8"),
    (12, 192, 32, "int8"),
    (16, 128, 64, "fp8"),
    (4, 24, 6, "int8"),
)


# Of attention over explicit keys and values: query heads, groups, own width of a key, shared, turned, width of a value, type.
OFFLINE_EXPLICIT = (
    (8, 8, 64, 0, 0, 64, "bf16"),
    (8, 2, 64, 0, 0, 64, "bf16"),
    (8, 2, 32, 32, 0, 64, "bf16"),  # tied, and its rotated key shared
    (8, 8, 64, 32, 0, 64, "bf16"),
    (8, 2, 64, 0, 64, 64, "bf16"),
    (8, 2, 64, 0, 32, 64, "bf16"),
    (16, 4, 128, 0, 128, 128, "fp16"),
    (16, 4, 128, 0, 0, 128, "bf16"),
    (16, 4, 256, 0, 0, 256, "bf16"),
    (16, 16, 192, 0, 0, 128, "bf16"),
    (64, 1, 64, 0, 0, 64, "bf16"),
    (64, 1, 128, 0, 0, 128, "bf16"),
    (64, 1, 256, 0, 0, 256, "bf16"),
    (64, 1, 256, 0, 256, 256, "bf16"),
    (8, 2, 64, 0, 0, 64, "fp32"),
    (8, 2, 64, 0, 64, 64, "fp32"),
    (8, 2, 256, 0, 0, 256, "fp32"),
)


def compile_offline() -> int:
    """What the compiler makes of the table's tiles on Hopper (sm_90a)."""
    from modeling.kernels.decode_kernels import check_kernel

    with as_user_error():
        check_kernel("triton", "cuda")
    import triton

    from modeling.kernels import latent_decode_triton as kernel

    if not isinstance(kernel.attend_kernel, triton.runtime.JITFunction):
        raise UserError("--offline compiles; TRITON_INTERPRET is set, and with it Triton interprets: unset it")
    print(f"triton {triton.__version__}, sm_90a")
    print(
        f"{'heads':>5}{'widths':>9}{'dtype':>6}  {'tile':<16}{'splits':<8}{'registers':>10}{'spilt B':>8}{'KiB':>7}"
        f"{'resident':>9}{'table':>6}{'wgmma':>6}{'mma':>5}{'cp.async':>9}{'ldmatrix':>9}"
    )
    for line in tqdm(offline_rows(), total=2 * (len(OFFLINE) + len(OFFLINE_EXPLICIT)) + 14, disable=None):
        tqdm.write(line)
    return 0


def offline_rows() -> Iterator[str]:
    from modeling.kernels import latent_decode_triton as kernel

    dtypes = {
        "bf16": torch.bfloat16,
        "fp16": torch.float16,
        "fp32": torch.float32,
        "int8": torch.int8,
        "fp8": torch.float8_e4m3fn,
    }
    yield from explicit_rows(dtypes)
    for heads, rank, rope, dtype in OFFLINE:
        words = dtypes[dtype] in kernel.EIGHT_BITS
        number = "bf16" if words else dtype
        tile = kernel.choose_tile(n_heads=heads, kv_lora_rank=rank, dtype=dtypes[number], has_wgmma=True, words=words)
        for splits in (1, 2):
            constants = kernel.attend_constants(
                n_heads=heads, kv_lora_rank=rank, qk_rope_head_dim=rope, plan=kernel.Plan(tile, splits)
            )
            types = dict.fromkeys(("q_latent", "q_rope", "latent", "latent_scale", "k_rope"), f"*{number}")
            types |= {"lengths": "*i64", "lse": "*fp32", "scale_log2": "fp32"}
            types["out"] = f"*{number}" if splits == 1 else "*fp32"
            function = kernel.attend_kernel
            if words:
                function, types["latent"] = kernel.attend_words_kernel, "*i32"
                constants |= kernel.words_constants(rank, dtypes[dtype], by_bits=True)
            found = compile_one(function, constants, types, tile.warps, tile.stages, tile.registers)
            yield (
                f"{heads:>5}{f'{rank}+{rope}':>9}{dtype:>6}  {f'{tile.heads}x{tile.slots} w{tile.warps} s{tile.stages}':<16}"
                f"{'one' if splits == 1 else 'several':<8}{found.row(tile.warps, tile.resident)}"
            )
    types = {"partial": "*fp32", "lse": "*fp32", "out": "*bf16"}
    for splits in (2, 4, 8, 16, 32, 64):
        constants = kernel.join_constants(n_heads=128, kv_lora_rank=512, splits=splits)
        found = compile_one(kernel.join_kernel, constants, types, 1, 2, 255)
        yield f"{128:>5}{'512':>9}{'bf16':>6}  {'joining':<16}{splits:<8}{found.row(1, None)}"
    yield from gluon_rows()


def explicit_rows(dtypes: dict[str, torch.dtype]) -> Iterator[str]:
    from modeling.kernels import attend_decode_triton as kernel

    for heads, groups, own, rope, turned, value, dtype in OFFLINE_EXPLICIT:
        tile = kernel.choose_tile(n_heads=heads // groups, K=own + rope, V=value, dtype=dtypes[dtype], turned=turned > 0)
        for splits in (1, 2):
            constants = kernel.attend_constants(
                n_heads=heads,
                n_kv_heads=groups,
                own=own,
                rope=rope,
                turned=turned,
                v_width=value,
                tied=turned > 0 or own < value,
                plan=kernel.Plan(tile, splits),
            )
            types = dict.fromkeys(("q", "k", "v", "k_rope", "gain", "sinks"), f"*{dtype}")
            types |= {"cos": "*fp32", "sin": "*fp32", "lengths": "*i64", "lse": "*fp32", "scale_log2": "fp32"}
            types["out"] = f"*{dtype}" if splits == 1 else "*fp32"
            found = compile_one(
                kernel.attend_kernel, constants | {"SINKS": True}, types, tile.warps, tile.stages, tile.registers
            )
            widths = f"{own}+{rope}" if not turned else f"{own - turned}t{turned}"
            yield (
                f"{heads // groups:>5}{widths:>9}{dtype:>6}  {f'{tile.heads}x{tile.slots} w{tile.warps} s{tile.stages}':<16}"
                f"{'one' if splits == 1 else 'several':<8}{found.row(tile.warps, tile.resident)}"
            )


def gluon_rows() -> Iterator[str]:
    from triton.experimental.gluon import language as gl

    from modeling.kernels import latent_decode_gluon_heads_triton as by_heads
    from modeling.kernels import latent_decode_gluon_slots_triton as by_slots

    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)
    boxes = ("bf16", 256), ("i16", 256), ("bf16", 64), ("bf16", by_heads.PIECE.value)
    wide, words, narrow, piece = (f"tensordesc<{of}[1, 64, {n}],{layout!r}>" for of, n in boxes)
    types = {"q_latent": wide, "q_rope": narrow, "latent": wide, "k_rope": narrow}
    types |= {"lengths": "*i64", "lse": "*fp32", "scale_log2": "fp32"}
    forms = [(128, "bf16", by_heads, by_heads.TILE, types | {"latent": piece})]
    types = types | {"q_latent": "*bf16", "q_rope": "*bf16", "latent_scale": "*bf16"}
    forms.append((16, "bf16", by_slots, by_slots.WIDE_TILE, types))
    forms += [(16, name, by_slots, by_slots.TILE, types | {"latent": words}) for name in EIGHT_BITS]
    for heads, name, kernel, tile, types in forms:
        for one in (True, False):
            constants: dict = {"ONE_SPLIT": one}
            if kernel is by_slots:
                constants = by_slots.attend_constants(EIGHT_BITS.get(name, torch.bfloat16), one=one)
            types |= {"out": "*bf16" if one else "*fp32"}
            found = compile_one(kernel.attend_kernel, constants, types, tile.warps, tile.stages, tile.registers)
            yield (
                f"{heads:>5}{'512+64':>9}{name:>6}  {f'gluon {tile.heads}x{tile.slots}':<16}{'one' if one else 'several':<8}"
                f"{found.row((1 + constants.get('GROUPS', 2)) * tile.warps, tile.resident)}"
            )


@dataclass(frozen=True)
class Compiled:
    registers: int
    spilt_bytes: int
    shared_bytes: int
    instructions: dict[str, int]

    def row(self, warps: int, expected: int | None) -> str:
        resident = min(
            HOPPER_REGISTERS // (32 * warps * -(-self.registers // 8) * 8),
            HOPPER_SHARED_BYTES // (self.shared_bytes + 1024),
            64 // warps,
        )
        return (
            f"{self.registers:>10}{self.spilt_bytes:>8}{self.shared_bytes / 1024:>7.1f}{resident:>9}{expected or '':>6}"
            f"{self.instructions['wgmma.mma_async']:>6}{self.instructions['mma.sync']:>5}"
            f"{self.instructions['cp.async.cg']:>9}{self.instructions['ldmatrix']:>9}"
        )


def compile_one(function: object, constants: dict, types: dict[str, str], warps: int, stages: int, registers: int) -> Compiled:
    """Compile as a launch with aligned pointers and strides would; registers, and the stack for what was spilt."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    names: list[str] = function.arg_names  # type: ignore[attr-defined]
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    as_they_come = [each.name for each in function.params if each.do_not_specialize]  # type: ignore[attr-defined]
    plain = ("scale_log2", *as_they_come, *(name for name in types if types[name].startswith("tensordesc")))
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in constants and name not in plain}
    values = {(names.index(name),): value for name, value in constants.items()}
    made = triton.compile(
        (GluonASTSource if function.is_gluon() else ASTSource)(function, signature, values, aligned),  # type: ignore[attr-defined]
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": warps, "num_stages": stages, "maxnreg": registers},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used, spilt = (int(re.findall(rf"{what}:(\d+)", usage)[0]) for what in ("REG", "STACK"))
    ptx = made.asm["ptx"]
    found = {name: ptx.count(name) for name in ("wgmma.mma_async", "mma.sync", "cp.async.cg", "ldmatrix")}
    return Compiled(used, spilt, made.metadata.shared, found)


if __name__ == "__main__":
    run_script(main, description=__doc__, options=LatentDecodeOptions)
