"""torch.compile for tensors whose shapes are known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def compile_each(function: Callable[..., Any], *, fullgraph: bool = False) -> Callable[..., Any]:
    """torch.compile for each shape, and each model, by itself.

    torch gives a function up that it has compiled for eight of them, and runs it eagerly for all others or, with fullgraph,
    fails. The forward pass of all models is one function, so that nine variants or nine lengths of a prompt are enough.
    """
    config = torch._dynamo.config  # torch imports it here, where it is asked for: that takes seconds
    for limit in ("recompile_limit", "accumulated_recompile_limit"):
        setattr(config, limit, max(1000, getattr(config, limit)))
    return torch.compile(function, dynamic=False, fullgraph=fullgraph)
