"""Shapes without numbers: of every variant as they are, at no price, and ready to be filled."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from harness.config.build import build_model
from harness.config.compose import load_train_config, options_of
from harness.config.places import ROOT
from modeling.shapes import shapes_only

VARIANTS = options_of("attention")


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_of_shapes_alone_has_those_of_the_model(variant: str) -> None:
    config = load_train_config([f"attention={variant}"])
    with shapes_only():
        meta = build_model(config, 64)
    torch.manual_seed(0)
    model = build_model(config, 64)
    for kind in ("named_parameters", "named_buffers"):
        described, real = (
            {name: (tensor.shape, tensor.dtype, tensor.requires_grad) for name, tensor in getattr(each, kind)()}
            for each in (meta, model)
        )
        assert described == real
    assert all(tensor.is_meta for tensor in [*meta.parameters(), *meta.buffers()])

    torch.manual_seed(1)  # and afterwards initial values are drawn again
    assert not torch.equal(build_model(config, 64).embedding.weight, model.embedding.weight)
    meta.to_empty(device="cpu").load_state_dict(model.state_dict())
    tokens_BT = torch.arange(12).reshape(2, 6)
    assert torch.equal(meta.eval()(tokens_BT), model.eval()(tokens_BT))  # tables of positions, too


def test_nothing_is_compiled_for_shapes() -> None:
    program = """
import sys
from harness.config.build import build_model
from harness.config.compose import load_train_config, options_of
from modeling.shapes import shapes_only
for variant in options_of("attention"):
    with shapes_only():
        build_model(load_train_config([f"attention={variant}"]), 64)
assert "torch._dynamo" not in sys.modules, "the compiler was loaded, which takes seconds"
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
