"""The gated delta rule in Triton is delta_rule.py's function: outputs, the state and all six gradients.

On a CPU the kernels run in Triton's interpreter, in a process of its own: TRITON_INTERPRET must be set before triton is
imported and nothing else in the session may see it. The interpreter multiplies bfloat16 as integers: float32 and float16 there.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.errors import UserError
from harness.runs.load import pin_execution
from modeling.attention import set_execution
from modeling.attention.contract import relative_error
from modeling.kernels.decode_kernels import DELTA_RULES, EXPLICIT, OTHERS
from modeling.kernels.delta_rule import delta_rule
from tests.modeling.test_gdn import SIZES, drawn, layer
from tests.support.variants import gpt_from

ROOT = Path(__file__).resolve().parents[2]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
HEADS = {"head_dim": 64, "v_head_dim": 64}  # that may be named
NAMES = ("out", "state", "dq", "dk", "dv", "dlog_decay", "dbeta", "dstate")
# B, T, G, H, K, V, decay, whether keys are near one another (then A's powers reach 1e15)
SHAPES = (
    (2, 3, 1, 1, 8, 5, 0.3, False),
    (1, 70, 1, 3, 20, 16, 0.3, False),
    (1, 130, 2, 4, 16, 32, 0.02, True),
    (2, 128, 1, 1, 64, 64, 0.0, False),
    (1, 100, 2, 2, 32, 64, 400.0, False),  # a decay of exp(-400), whose inverse no float holds
)


def results(function: Any, values: list[Tensor]) -> list[Tensor]:
    own: list[Any] = [x.clone().requires_grad_() for x in values]
    out, state = function(*own, scale=0.3)
    weights = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=torch.float64)
    ((out.double() * weights.view_as(out)).sum() + state.double().square().sum()).backward()
    return [out.detach(), state.detach(), *(x.grad for x in own)]


def exactly(q: Tensor, k: Tensor, *others: Any, **options: Any) -> tuple[Tensor, Tensor]:
    q, k = (x.repeat_interleave(others[0].shape[2] // x.shape[2], dim=2) for x in (q, k))
    return delta_rule(q, k, *others, **options)


def errors(shape: tuple[Any, ...], dtype: torch.dtype, device: str) -> dict[str, float]:
    """Of each result, to float64 from the same numbers. A gradient that is 0 (of a state long forgotten) has none."""
    from modeling.kernels.delta_rule_triton import delta_rule_by_triton

    B, T, G, H, K, V, decay, near = shape
    generator = torch.Generator().manual_seed(0)

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator)

    q, k, v = random(B, T, G, K), random(B, T, G, K) * (0.05 if near else 1.0) + near, random(B, T, H, V)
    q, k = (x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    gates = [-decay * random(B, T, H).square(), random(B, T, H).sigmoid(), random(B, H, K, V)]
    values = [x.to(device) for x in (q.to(dtype), k.to(dtype), v.to(dtype), *gates)]
    found = results(delta_rule_by_triton, values)
    if device != "cpu":  # in the interpreter programs come one after the other
        again = results(delta_rule_by_triton, values)
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True)), "it repeats bit for bit"
    wanted = results(exactly, [x.double() for x in values])
    named = zip(NAMES, found, wanted, strict=True)
    return {name: relative_error(a.double(), b) for name, a, b in named if b.abs().max() > 1e-6}


@needs_triton
def test_it_equals_float64_in_the_interpreter() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.kernels.test_delta_rule_triton"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 2 * len(SHAPES)
    for name, each in found.items():
        assert len(each) >= len(NAMES) - 1
        # Sums of log a to -25,600 have 3e-3 of error in float32, whoever computes them.
        allowed = 1e-3 if "400.0" in name else 5e-6
        assert max(each.values()) < (allowed if "float32" in name else 2e-2 if "True" in name else 3e-3), (name, each)


def interpreted() -> dict[str, dict[str, float]]:
    from modeling.kernels.delta_rule_triton import _operator

    values = [torch.randn(1, 70, 2, 16).requires_grad_() for _ in range(3)]
    gates = [torch.rand(1, 128, 2).neg().requires_grad_(), torch.rand(1, 128, 2).requires_grad_()]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(_operator, (*values, *gates, torch.randn(1, 2, 16, 16).requires_grad_(), 0.3), test_utils=checks)
    return {f"{shape} {dtype}": errors(shape, dtype, "cpu") for shape in SHAPES for dtype in (torch.float32, torch.float16)}


@needs_triton
@torch.no_grad()
def test_a_layer_that_names_it_takes_it_for_chunks_of_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Single tokens are torch's and other types are refused; where nobody chose, a layer takes it where it can run."""
    from modeling.kernels import delta_rule_triton

    calls: list[tuple[Any, ...]] = []

    def stand_in(q: Tensor, k: Tensor, v: Tensor, *others: Any, scale: float) -> tuple[Tensor, Tensor]:
        calls.append((q.dtype, tuple(q.shape), tuple(v.shape), *(x.dtype for x in others)))
        return exactly(q.float(), k.float(), v.float(), *others, scale=scale)

    monkeypatch.setattr(delta_rule_triton, "delta_rule_by_triton", stand_in)
    ours, x_BTD = layer(**HEADS), drawn(9)
    outs = {}
    for kernel in ("auto", "torch", "triton"):
        set_execution(ours, backend="auto", decode="auto", kernel=kernel)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours(x_BTD[:, :1])
            assert not calls
            outs[kernel] = ours(x_BTD)
    assert torch.equal(outs["auto"], outs["torch"]) and 0 < relative_error(outs["triton"], outs["torch"]) < 2e-2
    shapes = (2, 9, ours.n_k_heads, 64), (2, 9, ours.n_v_heads, 64)
    assert calls == [(torch.bfloat16, *shapes, *[torch.float32] * 3)]
    with pytest.raises(ValueError, match=r"triton computes in bfloat16 or float16, not in torch.float32; take attention.kern"):
        ours(x_BTD)
    monkeypatch.setattr("modeling.kernels.decode_kernels.runs_triton", lambda device, dtype: True)
    for kernel, expected in (("torch", 0), ("auto", 1)):
        set_execution(ours, backend="auto", decode="auto", kernel=kernel)
        calls.clear()
        ours(x_BTD)  # in 32 bits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours(x_BTD[:, :1])
            layer()(x_BTD)  # of other widths
            assert torch.equal(ours(x_BTD), outs["triton" if expected else "torch"])
        assert len(calls) == expected


def test_it_is_for_the_layers_that_it_can_compute_and_refused_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one model latents, and keys and values, by the kernels of that name for one new token; delta layers by this one."""
    cpu, execution = torch.device("cpu"), {"backend": "sdpa_math", "decode": "auto", "kernel": "triton"}
    heads = [f"attention.kinds.delta.{name}=64" for name in ("head_dim", "v_head_dim")]
    delta = "delta:{mechanism:gdn,n_k_heads:2,n_v_heads:4,head_dim:64,v_head_dim:64,conv_width:4}"
    full = "full:{mechanism:gqa,n_kv_heads:2,head_dim:12,positions:rope,qk_rope_head_dim:0,qk_norm:false}"
    mixed = ["attention=mla", "attention.layers=[delta,latent,full]", f"attention.kinds={{{delta},latent:{{}},{full}}}"]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match=r"triton needs a CUDA device and this one is cpu; take attention.kernel=torch"):
        pin_execution(gpt_from(mixed, n_layers=3), execution, device=cpu, precision=torch.bfloat16)
    monkeypatch.setattr("harness.runs.load.check_kernel", lambda name, device: None)
    for overrides, kernels in ((mixed, ["triton"] * 3), (["attention=gdn_3_1", *heads], ["triton"] * 4)):
        model = gpt_from(overrides, n_layers=len(kernels))
        name = pin_execution(model, execution, device=cpu, precision=torch.bfloat16, trains=True)
        assert [each.kernel for each in model.attentions] == kernels
        assert name == "sdpa_math, triton"
        with pytest.raises(UserError, match=r"triton computes in bfloat16 or float16, not in torch.float32; take attention"):
            pin_execution(model, execution, device=cpu, precision=torch.float32)
    monkeypatch.setattr("modeling.kernels.decode_kernels.runs_triton", lambda device, dtype: True)
    by_itself = execution | {"kernel": "auto"}
    for changes, precision, named in (
        (heads, torch.bfloat16, ", triton"),
        (heads, torch.float32, ""),
        ([], torch.bfloat16, ""),
    ):
        model = gpt_from(["attention=gdn_3_1", *changes], n_layers=4)
        assert pin_execution(model, by_itself, device=cpu, precision=precision, trains=True) == "sdpa_math" + named
    assert pin_execution(gpt_from(["attention=mla"]), execution, device=cpu, precision=torch.float32) == "sdpa_math"
    for change, sentence in (
        (heads[1:], "takes heads of 32 or 64 dimensions, and this variant's head_dim is 12: use attention.kernel=torch"),
        (
            heads[:1],
            "takes values as wide as heads, and this variant's v_head_dim is 12, its head_dim 64: use attention.kernel=torch",
        ),
    ):
        with pytest.raises(ValueError, match=rf"attention\.kernel=triton {sentence}"):
            gpt_from(["attention=gdn_3_1", "attention.layers=[delta]", *change], n_layers=1).set_execution(kernel="triton")


def test_a_name_in_several_tables_needs_the_same_of_a_machine() -> None:
    tables = (OTHERS, DELTA_RULES, EXPLICIT)
    assert [name for name in OTHERS | DELTA_RULES if sum(name in table for table in tables) > 1] == ["triton"]
    needs = {(each.package, each.install, each.capability, each.interpreted) for each in (table["triton"] for table in tables)}
    assert len(needs) == 1


# --- on a GPU --------------------------------------------------------------------------------------------------------


# What may be named has K = V = 32 or 64: fewer tokens than a chunk, one chunk and a part, whole ones; heads shared and not.
SHAPES_ON_A_GPU = (
    (2, 3, 1, 1, 64, 64, 0.3, False),
    (1, 70, 1, 3, 64, 64, 0.3, False),
    (2, 130, 2, 4, 64, 64, 0.02, True),
    (1, 128, 1, 2, 64, 64, 0.0, False),
    (1, 100, 2, 2, 64, 64, 400.0, False),
    (8, 512, 8, 16, 64, 64, 0.1, False),
    (2, 3, 1, 1, 32, 32, 0.3, False),
    (1, 70, 1, 3, 32, 32, 0.3, False),
    (2, 130, 2, 4, 32, 32, 0.02, True),
    (8, 512, 8, 16, 32, 32, 0.1, False),
    (8, 1024, 8, 16, 32, 32, 0.1, False),
)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DELTA_RULES["triton"].dtypes, ids=str)
@pytest.mark.parametrize("shape", SHAPES_ON_A_GPU, ids=str)
def test_it_equals_float64_on_a_gpu(shape: tuple[Any, ...], dtype: torch.dtype) -> None:
    found = errors(shape, dtype, "cuda")
    unit = {torch.bfloat16: 8.0, torch.float16: 1.0}[dtype]
    allowed = 2e-2 if shape[-1] else 3e-3  # of float16, as in the interpreter
    assert max(found.values()) < allowed * unit, found


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_layer_under_autocast_on_a_gpu_is_close_to_float32(compiled: bool) -> None:
    """Its output and the gradients of all its parameters; without Triton by the same bound."""
    x_BTD = torch.randn(2, 150, SIZES["d_model"], generator=torch.Generator().manual_seed(1)).cuda()
    found: dict[str, list[Tensor]] = {}
    for how in ("float32", "triton", "torch"):
        ours = layer(**HEADS).cuda()
        if how != "float32":
            ours.kernel = how
        run: Any = torch.compile(ours, dynamic=False) if compiled and how == "triton" else ours
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=how != "float32"):
            out = run(x_BTD)
        (out.float() * torch.linspace(-1, 1, out.numel(), device="cuda").view_as(out)).sum().backward()
        found[how] = [out.detach().float(), *(p.grad for p in ours.parameters() if p.grad is not None)]
    assert not torch.equal(found["triton"][0], found["torch"][0])
    for how in ("triton", "torch"):
        assert max(relative_error(a, b) for a, b in zip(found[how], found["float32"], strict=True)) < 0.05, how


if __name__ == "__main__":
    print(json.dumps(interpreted()))
