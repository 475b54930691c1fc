"""What a Hugging Face model caches, measured: transformers' own class, built on the meta device, runs a few tokens.

Nothing is allocated and no weights are read: tensors on the meta device have a shape and no memory. Layers that are built
alike are run once. Cache layers of transformers' own kinds are read at two lengths and followed from there; others, which
compress, are run at the context itself. Only classes that are part of transformers are built, never code beside a
config.json.

A config.json may be wrong or hostile: harness/hf/cache_table.py asks for this in a process of its own, with limits on
time and memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from harness.decode.kv_calculator import LayerCache
from harness.errors import UserError

if TYPE_CHECKING:
    import torch

SHORT, LONGER = 16, 24  # lengths at which a cache is read
# Read from the folder by nobody here: code, quantised weights and the choice of kernels change no shape.
_IGNORED = {
    "auto_map",
    "quantization_config",
    "compression_config",
    "dtype",
    "torch_dtype",
    "_name_or_path",
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "experts_implementation",
    "_experts_implementation",
    "use_kernels",
    "kernel_config",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "use_cache",
    "hidden_act",
    "hidden_activation",
}
# Of a field that the file leaves out: no part of a cache's shape, or too likely to stop the class when doubled.
_BESIDE = re.compile(
    r"token|vocab|expert|topk|router|init|eps|theta|drop|seed|intermediate|position|mtp|nextn|loss|scal|"
    r"temperature|beam|length|_tp$|group$|n_group|image|audio|vision|repetition|num_return|bias|norm|residual|"
    r"softmax|upcast|bidirectional|is_encoder_decoder|return_dict|tie_|cross"
)
# Fields by which an architecture caches something else: a class that does not know one is not the model's.
FOREIGN = (
    "kv_lora_rank",
    "linear_attn_config",
    "linear_num_value_heads",
    "full_attention_interval",
    "attn_layer_period",
    "index_head_dim",
    "hybrid_layer_pattern",
    "hybrid_override_pattern",
    "num_kv_shared_layers",
    "global_head_dim",
    "num_global_key_value_heads",
    "compress_ratios",
    "compress_rates",
    "mamba_d_state",
    "ssm_state_size",
)
# And what its name says of a cache's shape, if it is one.
_SHAPES = re.compile(
    r"layer|head|hidden|embd|d_model|kv|rank|window|state|conv|chunk|dim|share|interval|period|offset|"
    r"pattern|expand|compress|ngroups|n_groups|attention"
)
_INDEX = {"layer_idx", "layer_id", "layer_index", "layer_number", "block_idx", "idx"}


@dataclass(frozen=True)
class Measurement:
    """What running the class has shown, and what else of its configuration the report needs."""

    model_type: str
    layers: tuple[LayerCache, ...]
    fields: Mapping[str, Any]  # of the language model: sizes of MLA, positions, heads
    attention_parameters: int | None = None  # of a layer with a latent
    defaults: Mapping[str, int] = field(default_factory=dict)  # deciding fields that the file leaves to the class


def known_to_transformers(model_type: str) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return model_type in CONFIG_MAPPING_NAMES


def close_to(model_type: str) -> list[str]:
    """Types of transformers with a similar name: for a sentence, never to be used in its place."""
    import difflib

    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return difflib.get_close_matches(model_type, list(CONFIG_MAPPING_NAMES), n=1, cutoff=0.8)


def measure_cache_of(config: Mapping[str, Any], context: int) -> Measurement:
    """The cache of the language model that a config.json describes, whose model_type transformers knows.

    context: tokens of a sequence, for layers whose cache is in no proportion to it. Raises UserError for what the class
    refuses, what is no causal language model, and what holds no cache that can be read.
    """
    language, written = _language_config(config)
    try:
        seen = _seen_somehow(language, context)
    except UserError:
        raise
    except MemoryError:
        raise UserError(
            "the model of this config.json takes more memory than any model's shape does: one of its sizes cannot be meant"
        ) from None
    except Exception as error:
        null = [
            name
            for name in ("num_attention_heads", "num_key_value_heads", "head_dim", "layer_types", "v_head_dim")
            if name in _names(language) and _global(language, name) is None
        ]
        absent = f" (null or absent: {', '.join(null)})" if null else ""
        raise UserError(
            f"transformers cannot run its class for model_type={language.model_type} with this config.json: "
            f"{_sentence(error)}{absent}"
        ) from None
    if not any(layer.parts or layer.states or layer.at_context for layer in seen.layers):
        raise UserError(
            f"model_type={language.model_type} keeps no cache that can be read: it is no causal language model, "
            f"or keeps its states elsewhere"
        )
    names = (
        "num_attention_heads",
        "hidden_size",
        "q_lora_rank",
        "kv_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
        "max_position_embeddings",
        "num_nextn_predict_layers",
    )
    fields = {name: value for name in names if isinstance(value := _global(language, name), int)}
    return Measurement(
        language.model_type, seen.layers, fields, seen.attention_parameters, _deciding_defaults(language, written, seen.layers)
    )


# --- the configuration -----------------------------------------------------------------------------------------------


def _sentence(error: BaseException) -> str:
    """What went wrong, on one line. Strict classes of huggingface_hub say it in their cause."""
    while error.__cause__ is not None and "validation error" in str(error).lower():
        error = error.__cause__
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def _without_choices(value: Any) -> Any:
    if isinstance(value, Mapping):
        if len(value) == 1 and isinstance(value.get("__float__"), str):  # as transformers writes Infinity
            return float(value["__float__"])
        return {key: _without_choices(inner) for key, inner in value.items() if key not in _IGNORED}
    return [_without_choices(inner) for inner in value] if isinstance(value, list) else value


def _language_config(config: Mapping[str, Any]) -> tuple[Any, Mapping[str, Any]]:
    """(transformers' configuration of the language model, the fields that the file gives of it)."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    given = _without_choices(config)
    pattern = given.get("hybrid_layer_pattern")
    if given["model_type"] == "mimo_v2_flash" and isinstance(pattern, list) and "layer_types" not in given:
        given["layer_types"] = ["sliding_attention" if windowed else "full_attention" for windowed in pattern]
        del given["hybrid_layer_pattern"]  # of which transformers' class knows the published value alone
    kind = CONFIG_MAPPING[given["model_type"]]
    try:
        whole = kind.from_dict(given)
        language = whole.get_text_config(decoder=True)
    except MemoryError:
        raise UserError(
            "the lists that this config.json implies take more memory than any model's: one of its sizes cannot be meant"
        ) from None
    except Exception as error:
        raise UserError(f"transformers' {kind.__name__} does not accept this config.json: {_sentence(error)}") from None
    if getattr(whole, "is_encoder_decoder", False) or getattr(language, "is_encoder_decoder", False):
        raise UserError(
            f"model_type={given['model_type']} is an encoder with a decoder (is_encoder_decoder=true): only "
            f"caches of causal self-attention are computed"
        )
    written = _written(whole, given, language) or {}
    fields = _names(language) | set(language.attribute_map)
    if language is not whole and not (written.keys() - {"model_type"}) & fields:
        raise UserError(
            f"model_type={given['model_type']} holds its language model in text_config or the like, which is "
            f"missing or names none: correct it"
        )
    heads, groups = _global(language, "num_attention_heads"), _global(language, "num_key_value_heads")
    if heads and groups and _global(language, "kv_lora_rank") is None and heads % groups:
        raise UserError(f"num_key_value_heads={groups} does not divide num_attention_heads={heads}: correct one of them")
    source = inspect.getsource(type(language))  # older names of fields are read there and stand in no list
    for name in FOREIGN:
        if written.get(name) and name not in fields and name not in source:
            raise UserError(
                f"{name} stands in a config.json of model_type={language.model_type}, whose class does not know "
                f"it: give the model_type of the code that runs it"
            )
    return language, written


def _written(config: Any, given: Any, language: Any) -> Mapping[str, Any] | None:
    """The part of what the file gives from which `language`, `config` or a configuration inside it, was made."""
    from transformers import PreTrainedConfig

    if config is language:
        return given if isinstance(given, Mapping) else None
    for name, inner in vars(config).items():
        if isinstance(inner, PreTrainedConfig):
            part = given.get(name) if isinstance(given, Mapping) else None
            found = _written(inner, part, language)
            if found is not None:
                return found
            if inner is language:  # older files of some wrappers are flat
                return given if isinstance(given, Mapping) else None
    return None


def _deciding_defaults(language: Any, written: Mapping[str, Any], layers: tuple[LayerCache, ...]) -> dict[str, int]:
    """Fields of the class's own that change the cache and that the file leaves out, with their defaults.

    Each is changed and measured again: a number doubled, a choice of yes and no turned round.
    """
    also = {alias for alias, name in language.attribute_map.items() if name in written}
    also |= {language.attribute_map[name] for name in written if name in language.attribute_map}
    found = {}
    for each in dataclasses.fields(type(language)):
        default = each.default
        if (
            each.name in written
            or each.name in also
            or each.name in _IGNORED
            or _BESIDE.search(each.name)
            or not isinstance(default, int)
            or _global(language, each.name) != default
            or not (isinstance(default, bool) or (default >= 1 and _SHAPES.search(each.name)))
            # Of use_X in a file without X: there is no X to use.
            or each.name.removeprefix("use_") in _names(language) - {each.name} - written.keys()
        ):
            continue
        try:
            changed = type(language).from_dict(_changed(written, language, each.name, default))
            differs = [_shape(layer) for layer in _seen(changed, None).layers] != [_shape(layer) for layer in layers]
        except Exception:
            differs = not isinstance(default, bool) and (
                re.search(r"layer|head|hidden|embd|d_model|kv|rank|window|state|conv|chunk", each.name) is not None
            )
        if differs:
            found[each.name] = default
    return found


def _changed(written: Mapping[str, Any], language: Any, name: str, default: int) -> dict[str, Any]:
    other = not default if isinstance(default, bool) else 2 * default
    return {**written, "model_type": language.model_type, name: other}


def _shape(layer: LayerCache) -> tuple[Any, ...]:
    return dict(layer.parts), layer.window, dict(layer.states), layer.kind, layer.naive, layer.mha


# --- running it ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Seen:
    layers: tuple[LayerCache, ...]
    attention_parameters: int | None


def _seen(language: Any, context: int | None) -> _Seen:
    model = _on_meta(language)
    short, longer = _run(model, language, SHORT), _run(model, language, LONGER)
    whole = None
    if context is not None and any(layer.custom for layer in short):
        whole = _run(model, language, context)
    types, own = getattr(language, "layer_types", None) or [], language.per_layer_config
    layers = tuple(
        _layer(
            a,
            b,
            None if whole is None else whole[i],
            own[i] if i < len(own) else language,
            types[i] if i < len(types) else "",
            context,
        )
        for i, (a, b) in enumerate(zip(short, longer, strict=True))
    )
    counted = {sum(p.numel() for p in module.parameters()) for module in model.modules() if hasattr(module, "kv_b_proj")}
    return _Seen(layers, counted.pop() if len(counted) == 1 else None)


# What routes tokens to experts shapes no cache, and files that describe the cache alone leave it out.
_ROUTING = {
    "num_experts_per_tok": 1,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 64,
    "n_shared_experts": 1,
    "top_k_experts": 1,
}


def _seen_somehow(language: Any, context: int) -> _Seen:
    """What is seen; where the class does not run, once more with what is null and follows from other fields filled in."""
    try:
        return _seen(language, context)
    except Exception:
        values: dict[str, Any] = dict(_ROUTING)
        heads, width = _global(language, "num_attention_heads"), _global(language, "hidden_size")
        if heads and width and width % heads == 0:
            values |= {"head_dim": width // heads, "num_key_value_heads": heads}
        filled = {name: value for name, value in values.items() if name in _names(language) and _global(language, name) is None}
        # A latent has no use for the number of key/value heads, but transformers' class repeats keys by it.
        if heads and _global(language, "kv_lora_rank") and _global(language, "num_key_value_heads") not in (None, heads):
            filled["num_key_value_heads"] = heads
        if not filled:
            raise
        for name, value in filled.items():
            setattr(language, name, value)
        return _seen(language, context)


def _global(language: Any, name: str) -> Any:
    """A field that is one for all layers; None where there is none, or layers differ in it."""
    with contextlib.suppress(AttributeError, RuntimeError):
        return getattr(language, name)
    return None


def _names(language: Any) -> set[str]:
    return {each.name for each in dataclasses.fields(type(language))}


def _on_meta(language: Any) -> Any:
    """transformers' model without a head where there is such a class. Only classes of transformers: a lookup by type."""
    import torch
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        MODEL_MAPPING,
    )
    from transformers.utils import logging

    logging.set_verbosity_error()
    tables = (MODEL_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
    kind: Any = next((table[type(language)] for table in tables if type(language) in table), None)
    kind = kind or _text_model(language)
    if isinstance(kind, (tuple, list)):
        kind = kind[0]
    if kind is None:
        raise UserError(
            f"transformers has no language model of its own for model_type={language.model_type}: what its "
            f"layers cache cannot be measured"
        )
    with torch.device("meta"):
        model = kind._from_config(language, attn_implementation="eager", experts_implementation="eager", dtype=torch.bfloat16)
    if any(getattr(module, "is_decoder", None) is False for module in model.modules()):  # it fills a cache all the same
        raise UserError(
            f"model_type={language.model_type} with is_decoder=false is an encoder, which needs no cache: only "
            f"caches of causal self-attention are computed"
        )
    return model.eval()


def _text_model(language: Any) -> Any:
    """The model that is declared for a part of a wrapper, in the module beside its configuration."""
    from transformers import PreTrainedModel

    package, _, name = type(language).__module__.rpartition(".")
    module = getattr(sys.modules[package], name.replace("configuration_", "modeling_"))  # transformers loads it when asked
    for kind in vars(module).values():
        if (
            isinstance(kind, type)
            and issubclass(kind, PreTrainedModel)
            and kind.config_class is type(language)
            and kind.forward is not PreTrainedModel.forward
        ):
            return kind
    return None


def _run(model: Any, language: Any, tokens: int) -> list[_Held]:
    """The layers of the cache after one call with so many tokens; layers that are built alike share one."""
    for alike in (True, False):
        with _once_each(model, language, enabled=alike) as first:
            try:
                layers = _call(model, tokens)
            except Exception:
                if alike and first:
                    continue
                raise
        if not first:
            return layers
        if len(layers) == len(first):
            return [layers[index] for index in first]
    raise AssertionError("the second turn returns or raises")


@dataclass(frozen=True)
class _Held:
    """One layer of a cache after a call: its tensors by name, what it keeps at most, whether its kind is a model's own."""

    tensors: dict[str, torch.Tensor]
    window: int | None
    custom: bool


def _call(model: Any, tokens: int) -> list[_Held]:
    import torch
    from transformers import DynamicCache

    torch.distributions.Distribution.set_default_validate_args(False)  # which would look at values
    tokens_1T = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    with torch.no_grad(), torch.device("meta"), _without_data():
        out = model(input_ids=tokens_1T, use_cache=True)
        cache = getattr(out, "past_key_values", None)
        if cache is None:
            cache = getattr(out, "cache_params", None)
        if cache is None and "past_key_values" in inspect.signature(model.forward).parameters:
            cache = DynamicCache(config=model.config)  # some fill one that they are given and make none
            model(input_ids=tokens_1T, past_key_values=cache, use_cache=True)
    layers = getattr(cache, "layers", None)
    if layers is None:
        raise UserError(
            f"{type(model).__name__} keeps no cache that can be read: it is no causal language model, or keeps "
            f"its states in a form of its own"
        )
    held = [_Held(_tensors(vars(layer)), getattr(layer, "sliding_window", None), _is_own(layer)) for layer in layers]
    # MiniMax's states stand beside the layers, by layer.
    for name, beside in vars(cache).items():
        if name != "layers" and isinstance(beside, list):
            held += [_Held({}, None, False) for _ in range(len(beside) - len(held))]
            for layer, value in zip(held, beside, strict=False):
                layer.tensors.update(_tensors({name: value}))
    return held


def _is_own(layer: Any) -> bool:
    """Whether a cache layer is of a kind that one model brings, and not of transformers' few."""
    return not type(layer).__module__.endswith("cache_utils")


def _without_data() -> Any:
    """Answers what a tensor without data cannot: its value is 0, no element is non-zero, a mask lets all pass.

    Models ask so for checks of masks and for the tokens that an expert received; no shape of a cache hangs on it.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    zero = {
        torch.Tensor.item: 0,
        torch.Tensor.__bool__: False,
        torch.Tensor.__int__: 0,
        torch.Tensor.__float__: 0.0,
        torch.Tensor.__contains__: False,
    }
    empty = {torch.nonzero, torch.Tensor.nonzero}

    class Answers(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if args and isinstance(args[0], torch.Tensor) and args[0].is_meta:
                if func in zero:
                    return zero[func]
                if func in empty or (func in (torch.where, torch.Tensor.where) and len(args) + len(kwargs) == 1):
                    found = torch.empty(0, args[0].dim(), dtype=torch.long, device="meta")
                    return found.unbind(1) if func not in empty or kwargs.get("as_tuple") else found
                if func is torch.Tensor.__getitem__:
                    mask = args[1]
                    if isinstance(mask, torch.Tensor) and mask.dtype == torch.bool:
                        return args[0].reshape(-1, *args[0].shape[mask.dim() :])
                    if isinstance(mask, tuple):
                        args = (
                            args[0],
                            tuple(
                                slice(None) if isinstance(at, torch.Tensor) and at.dtype == torch.bool and at.dim() == 1 else at
                                for at in mask
                            ),
                        )
            return func(*args, **kwargs)

    return Answers()


@contextlib.contextmanager
def _once_each(model: Any, language: Any, *, enabled: bool) -> Iterator[list[int]]:
    """While it lasts, of layers that are built alike only the first computes and the others return what it returned.

    On the meta device a result is its shape, so nothing is lost but time. Gives, for each layer, the index of the one that
    computes for it; nothing where no list of layers stands for the whole model.
    """
    from torch import nn

    count = getattr(language, "num_hidden_layers", None)
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    if not enabled or not stacks or not isinstance(count, int) or count < 3:
        yield []
        return
    stack, first = stacks[0], []
    results: dict[int, Any] = {}
    seen: dict[str, int] = {}
    for i, layer in enumerate(stack):
        first.append(seen.setdefault(_signature(layer, language, i, count), i))

    def computing(index: int, forward: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            results[index] = forward(*args, **kwargs)
            return results[index]

        return call

    for i, layer in enumerate(stack):
        layer.forward = computing(i, layer.forward) if first[i] == i else (lambda *_, _of=first[i], **__: results[_of])
    try:
        yield first
    finally:
        for layer in stack:
            del layer.forward


def _signature(layer: Any, language: Any, index: int, count: int) -> str:
    """All that may tell a layer from another: its tensors, the plain attributes of its modules, its entry in lists."""
    shapes = [(name, tuple(t.shape)) for name, t in (*layer.named_parameters(), *layer.named_buffers())]
    attributes = [
        (
            path,
            type(module).__name__,
            sorted(
                (name, value)
                for name, value in vars(module).items()
                if name not in _INDEX and (value is None or isinstance(value, (bool, int, float, str)))
            ),
        )
        for path, module in layer.named_modules()
    ]
    entries = [
        (name, value[index])
        for name, value in sorted(vars(language).items())
        if isinstance(value, (list, tuple)) and len(value) == count
    ]
    return repr((shapes, attributes, entries))


# --- reading a layer of the cache ------------------------------------------------------------------------------------


def _tensors(attributes: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """name -> tensor among an object's attributes, each once: DeepSeek-V4's values are its keys. No positions or counts."""
    import torch

    found: dict[str, torch.Tensor] = {}
    for name, value in attributes.items():
        for key, tensor in value.items() if isinstance(value, dict) else [(None, value)]:
            if (
                isinstance(tensor, torch.Tensor)
                and tensor.dim() > 1
                and (tensor.is_floating_point() or tensor.dtype == torch.bool)
                and all(tensor is not other for other in found.values())
            ):
                found[name if key is None else f"{name}[{key}]"] = tensor
    return found


def _layer(short: _Held, longer: _Held, whole: _Held | None, language: Any, layer_type: str, context: int | None) -> LayerCache:
    """What one layer keeps, from its cache at two lengths, and at the context where its kind is its own."""
    window, at_short, at_longer = short.window, short.tensors, longer.tensors
    parts: dict[str, int] = {}
    states: dict[str, int] = {}
    groups, divides = 1, 0
    latent = getattr(language, "kv_lora_rank", None)
    is_latent = latent is not None and "keys" in at_short and at_short["keys"].shape[1::2] == (1, latent)
    names = {"keys": "latent", "values": "rotated key"} if is_latent else {"keys": "keys", "values": "values"}
    names |= {"indexer_keys": "indexer key", "idx_keys": "indexer key"}
    for name, tensor in at_longer.items():
        before = at_short.get(name)
        if name in ("keys", "values"):  # (batch, heads, tokens, width)
            held = tensor.shape[1] * tensor.shape[3] if tensor.dim() == 4 else 0
            if held:
                parts[names[name]] = held
                groups = 1 if is_latent else tensor.shape[1]
        elif before is not None and before.shape == tensor.shape:
            states[name] = tensor.numel() * tensor.element_size()
            divides = tensor.shape[1] if divides == 0 else _common(divides, tensor.shape[1])
        elif not short.custom:
            parts[names.get(name, name)] = tensor.numel() // LONGER
    at_context = 0
    if whole is not None and context is not None and short.custom:
        states = {}
        held = sum(tensor.numel() for name, tensor in whole.tensors.items() if name not in ("keys", "values"))
        if held % context == 0 and window is None:
            parts |= {"indexer key": held // context} if held else {}
        else:
            at_context = held
    if "keys" in at_longer and at_longer.get("values") is None and "keys" in parts:
        parts = {"keys as values": parts.pop("keys"), **parts}
    kind = _kind(parts, states, window, layer_type, at_context, is_latent)
    naive, mha = _compared(parts, groups, is_latent, language)
    return LayerCache(parts, naive, mha, window if parts else None, kind, groups, states, max(divides, 1), at_context)


def _common(a: int, b: int) -> int:
    from math import gcd

    return gcd(a, b)


def _kind(
    parts: Mapping[str, int], states: Mapping[str, int], window: int | None, layer_type: str, at_context: int, latent: bool
) -> str:
    if at_context:
        return f"{layer_type.replace('_', ' ') or 'compressed'}, window of {window:,}" if window else "compressed"
    if not parts:
        return "state" if states else "no cache of its own"
    kind = "full attention"
    if latent:
        kind = "latent"
    elif window is not None:
        kind = f"{'chunks' if 'chunk' in layer_type else 'window'} of {window:,}"
    if latent and window is not None:
        kind = f"latent, window of {window:,}"
    if "indexer key" in parts:
        kind += ", indexed"
    return f"{kind} and state" if states else kind


def _compared(parts: Mapping[str, int], groups: int, latent: bool, language: Any) -> tuple[int | None, int | None]:
    """(elements with MLA's keys and values expanded, elements of MHA of this shape); None where that says nothing."""
    held, heads = sum(parts.values()), getattr(language, "num_attention_heads", None)
    if not isinstance(heads, int) or not held:
        return held, 0 if not held else None
    if latent:
        nope, rope, value = (getattr(language, f"{name}_head_dim", None) for name in ("qk_nope", "qk_rope", "v"))
        if nope is None or rope is None:
            return None, None
        value = value or language.hidden_size // heads
        indexer = parts.get("indexer key", 0)
        rotated = "rotated key" in parts
        return heads * (nope + rope + value) + indexer, heads * (nope + value + (0 if rotated else rope))
    plain = parts.get("keys", 0) + parts.get("values", 0)
    return held, heads * plain // groups if heads % groups == 0 and plain else None
