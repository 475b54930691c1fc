"""The most that torch holds at once while something is computed, by the storages that its operators make."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Watching(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, int] = {}  # bytes, by the storage
        self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {storage._cdata for storage in _storages((args, kwargs))}
        result = function(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage._cdata not in given and storage._cdata not in self.held:
                self.held[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.held.pop, storage._cdata, None)
                self.most = max(self.most, sum(self.held.values()))
        return result


def _storages(of: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(of) if isinstance(leaf, torch.Tensor)]


def most_allocated(compute: Callable[[], Any]) -> int:
    """Bytes beyond what was there before."""
    with _Watching() as watching:
        compute()
    return watching.most
