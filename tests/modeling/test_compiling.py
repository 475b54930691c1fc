"""torch.compile for each shape."""

from __future__ import annotations

import torch

from modeling.compiling import compile_each


def test_a_recompile_limit_is_raised_and_never_lowered() -> None:
    config = torch._dynamo.config
    for limit, other in (
        ("recompile_limit", "accumulated_recompile_limit"),
        ("accumulated_recompile_limit", "recompile_limit"),
    ):
        with config.patch({limit: 5000, other: 8}):
            compile_each(torch.neg)
            assert (getattr(config, limit), getattr(config, other)) == (5000, 1000)
