"""Modules made of shapes alone: what is counted, checked or filled with stored weights needs no initial values."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from modeling.refusal import ours

# In place, on tensors that have no numbers: draws, and what mechanisms make of them.
_IN_PLACE = (Tensor.normal_, Tensor.uniform_, Tensor.exp_, Tensor.expm1_, Tensor.log_)


class _NoDraws(TorchFunctionMode):
    """Random initial values are not drawn.

    On the meta device torch draws in Python, and loads its compiler for that: seconds in every process.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with ours():
            if is_draw(func):
                return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def is_draw(func: Any) -> bool:
    """Whether a function of torch gives a tensor its initial values."""
    return func in _IN_PLACE or getattr(func, "__module__", None) == "torch.nn.init"


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """Inside, new tensors and modules have shapes and no numbers (torch's meta device), and no initial values are drawn."""
    with torch.device("meta"), _NoDraws():
        yield
