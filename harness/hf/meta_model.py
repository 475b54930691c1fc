"""transformers' model of a configuration on the meta device, and the cache that it fills there with a few tokens.

Nothing is allocated and no weights are read: tensors on the meta device have a shape and no memory. Layers that are built
alike are run once. Only classes that are part of transformers are built, never code beside a config.json.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness.errors import UserError
from modeling.refusal import Mistake, ours

if TYPE_CHECKING:
    import torch

# Where a module keeps its own place among the layers, which tells it from no other.
_INDEX = {"layer_idx", "layer_id", "layer_index", "layer_number", "block_idx", "idx"}


class DoesNotRun(Exception):
    """transformers' class and a configuration do not go together; the cause is what the class raised."""


@contextlib.contextmanager
def _their_code() -> Iterator[None]:
    """Around calls of transformers: what is raised inside is about the configuration, unless it is a mistake of ours."""
    try:
        yield
    except (MemoryError, Mistake):
        raise
    except Exception as error:
        raise DoesNotRun from error


def with_fields(language: Any, fields: Mapping[str, Any]) -> Any:
    """A configuration of the same class with these fields. Raises DoesNotRun."""
    with _their_code():
        return type(language).from_dict({**fields, "model_type": language.model_type})


def on_meta(language: Any) -> Any:
    """transformers' model without a head where there is such a class. Only classes of transformers: a lookup by type.

    Raises DoesNotRun, and UserError for what is no causal language model.
    """
    import torch
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        MODEL_MAPPING,
    )
    from transformers.utils import logging

    from modeling.shapes import shapes_only

    logging.set_verbosity_error()
    tables = (MODEL_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
    with _their_code():  # its modules are imported when they are asked for
        kind: Any = next((table[type(language)] for table in tables if type(language) in table), None)
    kind = kind or _text_model(language)
    if isinstance(kind, (tuple, list)):
        kind = kind[0]
    if kind is None:
        raise UserError(
            f"transformers has no language model of its own for model_type={language.model_type}: what its "
            f"layers cache cannot be measured"
        )
    with _their_code(), shapes_only():
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
    with _their_code():
        module = getattr(sys.modules[package], name.replace("configuration_", "modeling_"))  # loaded when it is asked for
    for kind in vars(module).values():
        if (
            isinstance(kind, type)
            and issubclass(kind, PreTrainedModel)
            and kind.config_class is type(language)
            and kind.forward is not PreTrainedModel.forward
        ):
            return kind
    return None


@dataclass(frozen=True)
class Held:
    """One layer of a cache after a call: its tensors by name, what it keeps at most, whether its kind is a model's own."""

    tensors: dict[str, torch.Tensor]
    window: int | None
    custom: bool


def cache_after(model: Any, language: Any, tokens: int) -> list[Held]:
    """The layers of the cache after one call with so many tokens; layers that are built alike share one.

    Raises DoesNotRun, and UserError where no cache can be read.
    """
    from torch.nn import ModuleList

    count = getattr(language, "num_hidden_layers", None)
    stack = next((list(each) for each in model.modules() if isinstance(each, ModuleList) and len(each) == count), [])
    alike: dict[str, int] = {}
    first = [alike.setdefault(_signature(layer, language, i, len(stack)), i) for i, layer in enumerate(stack)]
    if len(alike) < len(stack):
        with contextlib.suppress(DoesNotRun, UserError), _once_each(stack, first):
            layers = _call(model, tokens)
            if len(layers) == len(first):
                return [layers[index] for index in first]
    return _call(model, tokens)


def _call(model: Any, tokens: int) -> list[Held]:
    import torch
    from transformers import DynamicCache

    torch.distributions.Distribution.set_default_validate_args(False)  # which would look at values
    tokens_1T = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    with _their_code(), torch.no_grad(), torch.device("meta"), _without_data():
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
    held = []
    for layer in layers:
        own = not type(layer).__module__.endswith("cache_utils")  # of a kind that one model brings, none of transformers' few
        held.append(Held(_tensors(vars(layer)), getattr(layer, "sliding_window", None), own))
    # MiniMax's states stand beside the layers, by layer.
    for name, beside in vars(cache).items():
        if name != "layers" and isinstance(beside, list):
            held += [Held({}, None, False) for _ in range(len(beside) - len(held))]
            for layer, value in zip(held, beside, strict=False):
                layer.tensors.update(_tensors({name: value}))
    return held


def _without_data() -> Any:
    """Answers what a tensor without data cannot: its value is 0, no element is non-zero, a mask lets all pass.

    Models ask so for checks of masks and for the tokens that an expert received; no shape of a cache hangs on it.
    """
    from torch.overrides import TorchFunctionMode

    class WithoutData(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            with ours():
                answer = _answer(func, args, kwargs or {})
            return answer()

    return WithoutData()


def _answer(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Callable[[], Any]:
    """What a call on tensors without data returns, once it is called: what it raises then is not ours."""
    import torch

    zero = {
        torch.Tensor.item: 0,
        torch.Tensor.__bool__: False,
        torch.Tensor.__int__: 0,
        torch.Tensor.__float__: 0.0,
        torch.Tensor.__contains__: False,
    }
    empty = {torch.nonzero, torch.Tensor.nonzero}

    def is_mask(at: Any) -> bool:
        return isinstance(at, torch.Tensor) and at.dtype == torch.bool and at.dim() == 1

    if args and isinstance(args[0], torch.Tensor) and args[0].is_meta:
        if func in zero:
            return lambda: zero[func]
        if func in empty or (func in (torch.where, torch.Tensor.where) and len(args) + len(kwargs) == 1):
            found = torch.empty(0, args[0].dim(), dtype=torch.long, device="meta")
            return (lambda: found.unbind(1)) if func not in empty or kwargs.get("as_tuple") else (lambda: found)
        if func is torch.Tensor.__getitem__:
            mask = args[1]
            if isinstance(mask, torch.Tensor) and mask.dtype == torch.bool:
                return lambda: args[0].reshape(-1, *args[0].shape[mask.dim() :])
            if isinstance(mask, tuple):
                args = args[0], tuple(slice(None) if is_mask(at) else at for at in mask)
    return lambda: func(*args, **kwargs)


@contextlib.contextmanager
def _once_each(stack: Sequence[Any], first: Sequence[int]) -> Iterator[None]:
    """While it lasts, a layer computes where it is the first of its kind, and returns what that one returned elsewhere.

    On the meta device a result is its shape, so nothing is lost but time. first: for each layer, the index of that one.
    """
    results: dict[int, Any] = {}

    def replaced(index: int, forward: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            with ours():
                alike = first[index]
            if alike == index or alike not in results:
                results[alike] = forward(*args, **kwargs)
            return results[alike]

        return call

    for index, layer in enumerate(stack):
        layer.forward = replaced(index, layer.forward)
    try:
        yield
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
