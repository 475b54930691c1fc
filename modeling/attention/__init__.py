"""Attention variants: the one table that names them, and how layers are built and computed; protocol.py says what they offer.

A variant is one class here plus one YAML in configs/attention/. Shape suffixes on tensors, used throughout:
B batch, T new tokens in this call, S visible tokens (cached + new), D d_model, H query heads, G key/value heads,
K query/key width per head, V value width per head, N un-rotated part of K, P rotated part of K, L kv_lora_rank,
R q_lora_rank. Weights and modules carry none.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from modeling.attention.gdn import GatedDeltaNet
from modeling.attention.gqa import GroupedQueryAttention
from modeling.attention.mla import MultiheadLatentAttention
from modeling.attention.protocol import Attention as Attention
from modeling.attention.tied import TiedKeyValueAttention
from modeling.attention.tpa import TensorProductAttention
from modeling.kernels.decode_kernels import OTHERS
from modeling.refusal import Refusal

MECHANISMS: dict[str, type[nn.Module]] = {
    "gqa": GroupedQueryAttention,  # MHA and MQA are its ends
    "mla": MultiheadLatentAttention,  # and what differs from it by options
    "tied": TiedKeyValueAttention,  # GTA, and keys and values as Gemma 4 and DeepSeek-V4 tie them
    "tpa": TensorProductAttention,
    "gdn": GatedDeltaNet,
}

MODEL_OWNED = ("d_model", "n_heads", "max_seq_len", "causal", "bias", "norm_eps")

# How attention is computed, not what it is: no constructor takes these, `set_execution` may change them at any time.
#   backend  modeling/kernels/attend.py: the kernel for explicit keys and values
#   decode   auto | expand | absorbed: the path through a cache of latents (modeling/attention/mla.py)
#   kernel   auto | torch | one of OTHERS in modeling/kernels/decode_kernels.py: the absorbed path of one new token; or of
#            DELTA_RULES there, every call, or EXPLICIT, one new token, of a layer that names it in `kernels`. A name may be in
#            several
EXECUTION = {"backend": "auto", "decode": "auto", "kernel": "auto"}


# What each layer is, of a variant whose layers differ; no constructor takes these.
#   layers  a kind for each layer; fewer than there are layers are a pattern, which is repeated and cut where it does not divide
#   kinds   by name, in which options a kind differs from the variant's own; `mechanism` may be among them, and `reads`: the
#           kind whose keys and values (or latents) it reads, of the nearest earlier layer of that kind, in place of its own
PATTERN = ("layers", "kinds")


def kind_options(mechanism: str, options: Mapping[str, Any], kind: str | None) -> tuple[str, dict[str, Any]]:
    """(mechanism, options) of the layers of one kind; None: of a variant whose layers are all alike.

    A kind of another mechanism keeps those of the variant's options that this mechanism takes too.
    """
    own = {} if kind is None else dict((options.get("kinds") or {})[kind])
    common = {key: value for key, value in options.items() if key not in PATTERN}
    another = own.pop("mechanism", mechanism)
    if another != mechanism:
        taken = (*EXECUTION, *inspect.signature(MECHANISMS[another].__init__).parameters)
        common = {key: value for key, value in common.items() if key in taken}
    return another, common | own


def kinds_of_layers(options: Mapping[str, Any], n_layers: int) -> list[str | None]:
    """The kind of each layer. Raises Refusal for kinds that are unknown, and for more of them than there are layers."""
    pattern, kinds = options.get("layers"), options.get("kinds") or {}
    if pattern is None:
        if kinds:
            raise Refusal(f"kinds={list(kinds)} are of no use without layers, which says where they stand: add layers")
        return [None] * n_layers
    if not pattern:
        raise Refusal("layers=[] names no kind: name one for each layer, or a pattern of them, or leave layers out")
    if unknown := [kind for kind in pattern if kind not in kinds]:
        known = ", ".join(kinds) or "nothing"
        raise Refusal(f"layers names {unknown[0]}, which is not in kinds ({known}): define it there, or correct the name")
    if len(pattern) > n_layers:
        raise Refusal(
            f"layers names {len(pattern)} layers and the model has {n_layers}: shorten the pattern, or raise model.n_layers"
        )
    return list(itertools.islice(itertools.cycle(pattern), n_layers))


def build_attentions(
    mechanism: str, options: Mapping[str, Any], n_layers: int, *, first: int | None = None, **owned: Any
) -> list[Any]:
    """The attention of every layer, from its YAML's options and the model's own numbers. A name, never code, selects it.

    options may hold the keys of EXECUTION and of PATTERN. Layers that share (options["sharing"]) are joined to their group's
    first. first: build only so many of the n_layers, from the first one on. Raises Refusal for what does not fit.
    """
    layers: list[Any] = []
    kinds = kinds_of_layers(options, n_layers)[:first]
    for index, kind in enumerate(kinds):
        name, chosen = kind_options(mechanism, options, kind)
        read = chosen.pop("reads", None)
        layer: Any = MECHANISMS[name](**owned, **{key: value for key, value in chosen.items() if key not in EXECUTION})
        group = chosen.get("sharing_layers", 1)
        if group > 1 and kind is not None:
            raise Refusal(
                f"sharing_layers={group} groups neighbours that are all alike, and layers={options['layers']} makes them "
                f"differ: leave one of the two out"
            )
        if group > n_layers:
            raise Refusal(
                f"sharing_layers={group} groups more layers than the model has, {n_layers}: choose fewer, or raise n_layers"
            )
        if index % group:
            _join(layer, layers, index % group)
        elif read is not None:
            _join(layer, layers, index - _layer_read(options["kinds"], kinds, index, read))
        layers.append(layer)
    execute(layers, **{key: options.get(key, default) for key, default in EXECUTION.items()})
    return layers


def _layer_read(options_of: Mapping[str, Mapping[str, Any]], kinds: Sequence[str | None], index: int, read: str) -> int:
    """The layer whose keys and values a layer reads: the nearest one before it of the kind that it names."""
    kind = kinds[index]
    if read not in options_of or "reads" in options_of[read]:
        what = "reads another kind's itself" if read in options_of else f"is not in kinds ({', '.join(options_of)})"
        raise Refusal(f"kinds.{kind}.reads={read}, which {what}: name a kind that computes keys and values")
    earlier = [number for number in range(index) if kinds[number] == read]
    if not earlier:
        place = f"layer {kinds.index(read)} is the first" if read in kinds else "no layer is"
        raise Refusal(
            f"layer {index} ({kind}) reads keys and values of kind {read}, and {place} of that kind: a layer reads an earlier "
            f"one, so name {read} before {kind} in layers"
        )
    return earlier[-1]


def _join(layer: Any, layers: Sequence[Any], back: int) -> None:
    """Have a layer follow the one so many places before it."""
    leader = layers[len(layers) - back]
    if not hasattr(layer, "follow") or type(leader) is not type(layer):
        raise Refusal(
            f"{type(layer).__name__} cannot read what {type(leader).__name__} caches: a layer reads one of its own mechanism, "
            f"gqa or mla"
        )
    layer.follow(leader)
    if getattr(layer, "sharing", "none") != "weights":
        layer.reads_back, leader.is_read = back, True


def reads_back(attention: Any) -> int:
    """How many layers before it stands the one whose keys and values, or latents, a layer reads; 0: it has its own."""
    return getattr(attention, "reads_back", 0)


def attends(attention: Any) -> bool:
    """Whether queries meet keys of single tokens, its own or another layer's; not where a state is all that is left of them."""
    return bool(attention.cache_shapes) or bool(reads_back(attention))


def hands_on(attention: Any) -> bool:
    """Whether a layer reads another one's keys and values, or another one reads its own, so that `forward` takes `shared`."""
    return bool(reads_back(attention)) or getattr(attention, "is_read", False)


def with_most_paths(attentions: Sequence[Any]) -> Any:
    """Of layers that may differ, the first of those with the most to choose from: `decode` and `kernel` are about these."""
    return max(attentions, key=lambda attention: len(attention.decode_paths))


def names_kernel(attentions: Sequence[Any], kernel: str) -> bool:
    """Whether some of the layers, which have no absorbed path, name a kernel as one for their calls."""
    return any(kernel in getattr(attention, "kernels", ()) for attention in attentions)


def execute(attentions: Sequence[Any], **changes: str) -> None:
    """Choose how layers are computed: backend, decode, kernel; what is not named stays.

    A path or kernel that some of the layers lack is for the others, and these stay as they choose themselves. Raises
    Refusal, and changes nothing, where no layer has it.
    """
    wanted = [{key: getattr(each, key, default) for key, default in EXECUTION.items()} | changes for each in attentions]
    refusals = [_refusal(attention, **choice) for attention, choice in zip(attentions, wanted, strict=True)]
    if refusals and all(refusals):
        raise Refusal(refusals[0])
    for attention, choice, refusal in zip(attentions, wanted, refusals, strict=True):
        if refusal is not None:
            choice |= {"decode": "auto", "kernel": "auto"}
        attention.backend, attention.decode, attention.kernel = choice["backend"], choice["decode"], choice["kernel"]


def set_execution(attention: Any, *, backend: str, decode: str, kernel: str) -> None:
    """Choose how a layer is computed. Raises Refusal for a path that it does not have."""
    execute([attention], backend=backend, decode=decode, kernel=kernel)


def _refusal(attention: Any, *, backend: str, decode: str, kernel: str) -> str | None:
    """Why a layer cannot be computed so."""
    paths = attention.decode_paths
    if decode not in paths:
        reason = "a norm or a rotation stands between W_Q and W_UK"
        if len(paths) == 1:
            reason = "it caches keys and values as they are used" if attends(attention) else "it has a state in place of them"
        known = decode in ("expand", "absorbed")
        return (
            f"attention.decode={decode} is not a path of this variant{f' ({reason})' if known else ''}; choose "
            f"{' or '.join(paths)}"
        )
    if kernel in ("auto", "torch"):
        return None
    if names_kernel([attention], kernel):
        lacks = attention.kernels[kernel]
    elif kernel not in OTHERS:
        return (
            f"attention.kernel={kernel} computes the gated delta rule, which is not in this variant; use attention.kernel=torch"
        )
    elif "absorbed" not in paths or decode == "expand":
        return f"attention.kernel={kernel} computes the absorbed path, which is not taken here; use attention.kernel=torch"
    else:
        lacks = attention.kernels_lack
    return None if lacks is None else f"attention.kernel={kernel} {lacks} use attention.kernel=torch"
