"""What decoding is measured on: a whole model or its attention alone, at which sizes, and what of it fits into memory.

A step takes T new tokens a row (one, except where several are asked for) against a cache filled with random numbers up
to the context (harness/decode/speed.py times it).

Letters: B batch, T new tokens in this call, S cached tokens (the context), D d_model, H query heads, G key/value heads,
K = N + P query/key width, V value width.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling.attention import attends, hands_on
from modeling.attention.cache import Cache
from modeling.attention.layers import AttentionLayers
from modeling.attention.mla import MultiheadLatentAttention
from modeling.attention.quantisation import CacheFormat, as_format
from modeling.attention.rope import rotate
from modeling.gpt import GPT
from modeling.kernels.attend import attend

WARM_UP_CALLS = 3
INPUTS = 4  # tokens or activations in rotation
MOST_CACHES = 32
# Attention alone is timed on several caches in rotation, each as the next layer would find it: together they are larger
# than what a processor keeps (two cores of a Xeon read 16 MiB at 54 GB/s and 64 MiB at 10).
ROTATED_CPU_BYTES = 128 * 2**20
ROTATED_AT_MOST_BYTES = 2 * 2**30
FILLED_AT_ONCE = 1024  # tokens


class ExpandedAttention(nn.Module):
    """MLA that caches keys and values of all heads as they are used, G (K + V) elements a token, for torch's SDPA: a peer.

    It has the weights of `layer` and computes the same function. pad_values: values are cached as wide as keys, for
    kernels of one width (the CPU's): padding at every step would copy the cache, and the kernel that takes two widths
    copies it too, from two rows on (batch 8, 1,024 tokens, 16 heads of 192/128: 306 ms, 109 and, padded ahead, 19).
    """

    decode_paths = ("auto",)

    def __init__(self, layer: MultiheadLatentAttention, *, pad_values: bool) -> None:
        super().__init__()
        self.layer, self.padding = layer, max(0, layer.qk_width - layer.v_head_dim) if pad_values else 0
        self.causal, self.n_heads, self.n_kv_heads = layer.causal, layer.n_heads, layer.n_kv_heads
        self.qk_width, self.v_head_dim = layer.qk_width, layer.v_head_dim + self.padding
        self.backend, self.decode, self.kernel = layer.backend, "auto", "torch"
        self.cache_shapes = {"k": (self.n_kv_heads, self.qk_width), "v": (self.n_kv_heads, self.v_head_dim)}

    @property
    def o_proj(self) -> nn.Linear:
        return self.layer.o_proj

    @staticmethod
    def fits(layer: nn.Module) -> bool:
        """Whether it is the paper's MLA, rotated or not: what this class can do."""
        return (
            isinstance(layer, MultiheadLatentAttention)
            and "absorbed" in layer.decode_paths
            and layer.in_proj is None
            and len(layer.latent_widths) == 1
            and layer.sharing == "none"
            and not hands_on(layer)
            and layer.latent == "learned"
            and layer.gate_proj is None
            and layer.sink_logits is None
        )

    def forward(self, x_BTD: Tensor, cache: Cache, *, valid_BT: Tensor | None = None) -> Tensor:
        """x_BTD -> x_BTD."""
        mla = self.layer
        B, T, _ = x_BTD.shape
        place = cache.place(T, valid_BT)
        if mla.q_up_proj is None:
            q_in = mla.q_proj(x_BTD)
        else:
            q_in = mla.q_up_proj(mla.q_latent_norm(mla.q_down_proj(x_BTD)) * mla.q_scale)
        q_BTHK = q_in.unflatten(-1, (mla.n_heads, mla.qk_width))
        assert mla.kv_down_proj is not None  # it fits
        latent_BTL = mla.latent_norms[0](mla.kv_down_proj(x_BTD)) * mla.kv_scale
        k_BTGK = mla.k_up_proj(latent_BTL).unflatten(-1, (mla.n_kv_heads, mla.qk_nope_head_dim))
        v_BTGV = mla.v_up_proj(latent_BTL).unflatten(-1, (mla.n_kv_heads, mla.v_head_dim))
        if mla.rope is not None and mla.k_rope_proj is not None:
            tables = place.tables(mla.rope, T)
            q_BTHN, q_BTHP = q_BTHK.split((mla.qk_nope_head_dim, mla.qk_rope_head_dim), dim=-1)
            q_BTHK = torch.cat((q_BTHN, rotate(q_BTHP, tables)), dim=-1)
            k_BT1P = rotate(mla.k_rope_proj(x_BTD).unsqueeze(2), tables)
            k_BTGK = torch.cat((k_BTGK, k_BT1P.expand(-1, -1, mla.n_kv_heads, -1)), dim=-1)
        seen = cache.append(valid_BT, k=k_BTGK, v=F.pad(v_BTGV, (0, self.padding)))
        out_BTHV, _ = attend(
            q_BTHK,
            seen["k"].to(q_BTHK.dtype),
            seen["v"].to(q_BTHK.dtype),
            scale=mla.scale,
            causal=place.causal,
            mask_BTS=place.mask_BTS,
            backend=self.backend,
        )
        return mla.o_proj(out_BTHV[..., : mla.v_head_dim].reshape(B, T, -1))


Part = GPT | AttentionLayers


@dataclass(frozen=True)
class Footprint:
    """What a model takes in memory."""

    parameter_bytes: int
    cache_bytes: Callable[[int], int]  # of a sequence of so many tokens, all layers

    def largest_batch(self, context: int, budget_bytes: int) -> int:
        """Sequences of this length whose caches fit beside the weights; 0 where the weights alone do not."""
        return max(0, (budget_bytes - self.parameter_bytes) // self.cache_bytes(context))


@dataclass(frozen=True)
class Writer:
    """Generation end to end, ours or someone else's: write(prompts_BT, new_tokens, stamp) stamps after each token."""

    name: str
    write: Callable[[Tensor, int, Callable[[], None]], None]
    cache_bytes: Callable[[int], int]  # of a sequence of so many tokens
    parameter_bytes: int  # of a copy of the weights


@dataclass
class DecodeSubject:
    """A variant: the part of it that is timed, in which paths, and what its whole model would take."""

    name: str
    part: Part
    paths: tuple[str, ...]  # values of attention.decode, a row of the table each
    whole: Footprint
    kernel: str = "auto"  # of one new token
    prefills: bool = True  # False: a peer that differs in its steps alone
    writer: Writer | None = None

    def row(self, path: str) -> str:
        return self.name if path == "auto" else f"{self.name} {path}"

    def select(self, path: str) -> None:
        """Have the part computed so."""
        self.part.set_execution(decode=path, kernel="torch" if path == "expand" else self.kernel)


def paths_of(attention: Any, decode: str) -> tuple[str, ...]:
    """The values of attention.decode that `decode` (auto, expand, absorbed or both) means for this variant."""
    if decode == "auto" or attention.decode_paths == ("auto",):
        return ("auto",)
    wanted = ("expand", "absorbed") if decode == "both" else (decode,)
    return tuple(path for path in wanted if path in attention.decode_paths)


def footprint(part: Part, *, dtype: torch.dtype, cache_dtype: torch.dtype | CacheFormat) -> Footprint:
    """Of a part in that dtype, which may stand on the meta device: nothing is allocated."""
    numbers = sum(parameter.numel() for parameter in part.parameters())
    return Footprint(numbers * dtype.itemsize, functools.partial(cache_bytes, part, cache_dtype))


def weight_bytes(part: Part) -> int:
    """Bytes of the weights that a step reads whole."""
    tables: set[int] = set()
    if isinstance(part, GPT):
        embeddings = (part.embedding, part.position_embedding)
        tables = {id(table.weight) for table in embeddings if table is not None} - {id(part.head.weight)}
    return sum(parameter.nbytes for parameter in part.parameters() if id(parameter) not in tables)


@dataclass(frozen=True)
class DecodePlan:
    """Settings of a measurement. `queries`: new tokens a call; above 1 only where a variant has both paths."""

    contexts: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype
    cache_dtype: torch.dtype | CacheFormat
    budget_bytes: int  # for weights and caches together
    queries: tuple[int, ...] = (1,)
    steps: int = 16  # of a reading, at most
    rounds: int = 5  # readings
    step: str = "auto"  # eager | compile | graph (modeling/generation.py); auto: a graph on CUDA, eager elsewhere
    prefill_tokens: int = 0  # time to first token where batch times context is at most this
    generate: bool = False  # end to end too, where a whole model is timed and a prompt may be read
    seed: int = 0

    @property
    def room(self) -> int:
        """Tokens that may follow the context."""
        return max(self.steps + WARM_UP_CALLS, *self.queries)

    @property
    def step_used(self) -> str:
        return ("graph" if self.device.type == "cuda" else "eager") if self.step == "auto" else self.step


@dataclass(frozen=True)
class Cell:
    """One batch size, context and number of new tokens, with the subjects that fit into memory together, and the others."""

    batch_size: int
    context: int
    queries: int
    groups: tuple[tuple[DecodeSubject, ...], ...]
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True)
class Skipped:
    row: str
    batch_size: int
    context: int
    queries: int
    reason: str


def plan_cells(subjects: Sequence[DecodeSubject], plan: DecodePlan) -> list[Cell]:
    """Every combination that is asked for, with who fits beside whom by estimate."""
    parameters = {id(p): p.nbytes for subject in subjects for p in subject.part.parameters()}
    written = sum(subject.writer.parameter_bytes for subject in subjects if subject.writer is not None)
    left = plan.budget_bytes - sum(parameters.values()) - written
    cells = []
    for B, S, T in itertools.product(plan.batch_sizes, plan.contexts, plan.queries):
        asked = [subject for subject in subjects if T == 1 or (len(subject.paths) > 1 and min(plan.batch_sizes) == B)]
        if not asked:
            continue
        fitting, skipped = [], []
        for subject in asked:
            needs = {path: needed_bytes(subject, path, B, S, T, plan) for path in subject.paths}
            kept = tuple(path for path, need in needs.items() if need <= left)
            if kept:
                fitting.append((dataclasses.replace(subject, paths=kept), max(needs[path] for path in kept)))
            skipped += [
                Skipped(
                    subject.row(path),
                    B,
                    S,
                    T,
                    f"takes about {need / 2**20:,.0f} MiB, {max(0, left) / 2**20:,.0f} "
                    f"MiB of the budget are left beside the weights",
                )
                for path, need in needs.items()
                if path not in kept
            ]
        cells.append(Cell(B, S, T, in_groups(fitting, left), tuple(skipped)))
    return cells


def in_groups(needs: Sequence[tuple[DecodeSubject, int]], room: int) -> tuple[tuple[DecodeSubject, ...], ...]:
    """Subjects in groups of neighbours that fit into `room` together."""
    groups: list[list[DecodeSubject]] = []
    taken = 0
    for subject, need in needs:
        if groups and taken + need <= room:
            groups[-1].append(subject)
            taken += need
        else:
            groups.append([subject])
            taken = need
    return tuple(map(tuple, groups))


def needed_bytes(subject: DecodeSubject, path: str, B: int, S: int, T: int, plan: DecodePlan) -> int:
    """Bytes beside the weights: caches, and by estimate what the largest layer makes of them meanwhile."""
    part = subject.part
    per_token = -(-cache_bytes(part, plan.cache_dtype, S) // S)
    caches = caches_in_rotation(part, B * cache_bytes(part, plan.cache_dtype, S), plan) if T == 1 else 1
    meanwhile = B * S * max(bytes_in_a_step(attention, path, T, plan) for attention in part.attentions)
    if T == 1 and plan.prefill_tokens >= B * S:
        whole = part.vocab_size * 8 if isinstance(part, GPT) else 0  # logits of all the prompt, and their copy
        widest = max(each.n_kv_heads * (each.qk_width + each.v_head_dim) for each in part.attentions)
        meanwhile = max(meanwhile, B * S * (whole + 4 * widest * plan.dtype.itemsize + per_token))
    return caches * B * cache_bytes(part, plan.cache_dtype, S + plan.room) + meanwhile


def bytes_in_a_step(attention: Any, path: str, T: int, plan: DecodePlan) -> int:
    """What a layer makes meanwhile of one cached token of one row."""
    if not attends(attention):
        return 0
    K, V = attention.qk_width, attention.v_head_dim
    used = attention.n_kv_heads * (K + V)
    cached = sum(math.prod(shape) for shape in attention.cache_shapes.values())
    elements, logits = 0, 0
    if attention.decode_paths != ("auto",) or cached < used:  # keys and values are made of what is cached
        if path != "absorbed":  # up-projected, joined with the rotated key, values padded to the width of keys
            elements = used + attention.n_kv_heads * (K + max(K, V))
        if path != "expand" or T > 1:  # which has a mask, and so no fused kernel
            logits = getattr(attention, "numbers_absorbed", 3) * T * attention.n_heads
        if path == "absorbed" and as_format(plan.cache_dtype) != as_format(plan.dtype):  # a cast of all that is cached
            elements = cached
    elif K != V or as_format(plan.cache_dtype) != as_format(plan.dtype):  # no fused kernel on some devices; a cast
        elements = used
    return elements * plan.dtype.itemsize + 4 * logits


def cache_bytes(part: Part, dtype: torch.dtype | CacheFormat, context: int) -> int:
    """Of one sequence of so many tokens, read off the buffers of a cache that is not allocated."""
    return sum(cache.nbytes for cache in part.new_cache(1, context, dtype=dtype, device="meta"))


def caches_in_rotation(part: Part, nbytes: int, plan: DecodePlan) -> int:
    """How many caches of `nbytes` the steps go through in turn. A whole model goes through those of its layers."""
    if isinstance(part, GPT) or plan.step == "compile":  # which would compile for each
        return 1
    enough = ROTATED_CPU_BYTES
    if plan.device.type == "cuda":
        enough = 4 * torch.cuda.get_device_properties(plan.device).L2_cache_size
    wanted = min(MOST_CACHES, max(INPUTS, -(-enough // nbytes)))
    return max(1, min(wanted, ROTATED_AT_MOST_BYTES // nbytes, plan.budget_bytes // 8 // nbytes))


def filled_cache(part: Part, B: int, S: int, plan: DecodePlan, generator: torch.Generator) -> list[Cache]:
    """A cache with S random tokens a row and room for more: what a prompt would leave, without reading one."""
    caches = part.new_cache(B, S + plan.room, dtype=plan.cache_dtype, device=plan.device)
    for attention, cache in zip(part.attentions, caches, strict=True):
        piece = {
            name: torch.randn(B, min(S, FILLED_AT_ONCE), *shape, dtype=plan.dtype, device=plan.device, generator=generator)
            for name, shape in attention.cache_shapes.items()
        }
        for start in range(0, S, FILLED_AT_ONCE):
            T = min(FILLED_AT_ONCE, S - start)
            if piece:
                cache.append(**{name: tensor[:, :T] for name, tensor in piece.items()})
            else:  # the layer reads another one's latents, or has a state
                cache.advance(T)
        for state in cache.states.values():
            state.normal_(generator=generator)
    return caches


def random_inputs(part: Part, B: int, T: int, plan: DecodePlan, generator: torch.Generator) -> Tensor:
    """Random tokens for a model, (B, T); random activations for attention alone, (B, T, D)."""
    if isinstance(part, GPT):
        return torch.randint(part.vocab_size, (B, T), device=plan.device, generator=generator)
    width = part.attentions[0].o_proj.out_features
    return torch.randn(B, T, width, dtype=plan.dtype, device=plan.device, generator=generator)
