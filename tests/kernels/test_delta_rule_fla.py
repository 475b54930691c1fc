"""attention.kernel=fla: our tensors as flash-linear-attention's, its gradients through a compiler, and its refusals.

On a CPU a stand-in has its two functions, by their documented arguments, in float64 and by token.
"""

from __future__ import annotations

import concurrent.futures
import importlib.metadata
import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.config.compose import load_train_config
from harness.errors import UserError
from harness.runs.load import pin_execution
from harness.study.decode_times import _subject
from modeling.attention.contract import relative_error
from modeling.kernels import delta_rule_fla
from modeling.kernels.decode_kernels import check_gradient, check_kernel
from modeling.kernels.delta_rule import delta_rule, delta_rule_step
from modeling.kernels.delta_rule_fla import _operator, delta_rule_by_fla
from scripts.benchmark_decode import DecodeOptions, make_subjects
from tests.modeling.test_gdn import drawn, layer
from tests.support.decoding import plan
from tests.support.variants import gpt_from

B, T, H, K, V = 2, 29, 3, 8, 4
ROUNDED = 4e-3  # of sixteen bits, to nearest


def by_token(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    outs = []
    for t in range(q.shape[1]):
        out, state = delta_rule_step(q[:, t], k[:, t], v[:, t], g[:, t], beta[:, t], state, scale=scale)
        outs.append(out)
    return torch.stack(outs, dim=1), state


class _Chunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scale: float, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*tensors)
        ctx.scale = scale
        out, state = by_token(*(x.double() for x in tensors), scale)
        return out.to(tensors[0].dtype), state.float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        def vjp() -> tuple[Tensor, ...]:
            tensors = [x.detach().double().requires_grad_() for x in ctx.saved_tensors]
            return torch.autograd.grad(by_token(*tensors, ctx.scale), tensors, [grad.double() for grad in grads])

        # In a thread of its own: inside an operator torch records nothing, and kernels need nothing recorded.
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            found = pool.submit(vjp).result()
        return None, *(grad.to(x.dtype) for grad, x in zip(found, ctx.saved_tensors, strict=True))


class StandIn:
    """fla.ops.gated_delta_rule as version 0.6 documents it, of what is asked of it here."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    @torch.compiler.disable
    def chunk_gated_delta_rule(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        scale: float | None = None,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
    ) -> tuple[Tensor, Tensor]:
        self.calls.append("chunk")
        self.check(q, k, v, g, beta, scale, initial_state, output_final_state)
        return _Chunks.apply(scale, q, k, v, g, beta, initial_state)

    @torch.compiler.disable
    def fused_recurrent_gated_delta_rule(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor | None = None,
        gk: Tensor | None = None,
        gv: Tensor | None = None,
        beta: Tensor | None = None,
        scale: float | None = None,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
    ) -> tuple[Tensor, Tensor]:
        self.calls.append("token")
        assert gk is None and gv is None and not torch.is_grad_enabled()
        self.check(q, k, v, g, beta, scale, initial_state, output_final_state)
        out, state = by_token(*(x.double() for x in (q, k, v, g, beta, initial_state)), scale)  # type: ignore[union-attr,misc]
        return out.to(v.dtype), state.float()

    @staticmethod
    def check(q: Any, k: Any, v: Any, g: Any, beta: Any, scale: Any, initial_state: Any, output_final_state: bool) -> None:
        rows, tokens, heads, width = q.shape
        assert k.shape == q.shape and v.shape[:3] == (rows, tokens, heads) and output_final_state and scale is not None
        assert g.shape == beta.shape == (rows, tokens, heads) and (g <= 0).all()
        assert initial_state.shape == (rows, heads, width, v.shape[3])
        assert q.dtype == k.dtype == v.dtype and q.dtype.itemsize == 2
        assert g.dtype == beta.dtype == initial_state.dtype == torch.float32


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    if request.node.get_closest_marker("gpu"):
        return None
    made: Any = StandIn()
    monkeypatch.setattr(
        delta_rule_fla, "_functions", lambda: (made.chunk_gated_delta_rule, made.fused_recurrent_gated_delta_rule)
    )
    torch._dynamo.reset()
    return made


def inputs(tokens: int = T, shape: tuple[int, ...] = (B, H, K, V), device: str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows, heads, width, v_width = shape

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator)

    q, k = (torch.nn.functional.normalize(normal(rows, tokens, heads, width), dim=-1).bfloat16() for _ in range(2))
    v, state = normal(rows, tokens, heads, v_width).bfloat16(), normal(rows, heads, width, v_width)
    made = [q, k, v, -normal(rows, tokens, heads).square(), normal(rows, tokens, heads).sigmoid(), state]
    return [x.to(device) for x in made]


def results(function: Any, tensors: list[Tensor]) -> list[Tensor]:
    """out, state and the six gradients of a sum of both."""
    values = [x.clone().requires_grad_() for x in tensors]
    out, state = function(*values, scale=0.3)
    (
        (out.double() * torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)).sum() + state.square().sum()
    ).backward()
    return [out.detach(), state.detach(), *(x.grad for x in values)]  # type: ignore[misc]


@pytest.mark.parametrize("compiled", [False, True])
def test_values_and_gradients_are_those_of_our_own_chunks(compiled: bool) -> None:
    function = torch.compile(delta_rule_by_fla, backend="aot_eager", fullgraph=True) if compiled else delta_rule_by_fla
    found, wanted = results(function, inputs()), results(delta_rule, [x.double() for x in inputs()])
    types_of = [torch.bfloat16, torch.float32, *(x.dtype for x in inputs())]
    for ours, right, dtype in zip(found, wanted, types_of, strict=True):
        assert ours.dtype == dtype and ours.shape == right.shape
        assert relative_error(ours, right) < (ROUNDED if dtype == torch.bfloat16 else 1e-2)


def test_the_operator_that_a_compiler_sees_is_what_it_says() -> None:
    tensors = [x.requires_grad_() for x in inputs()]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(_operator, (*tensors, 0.3), test_utils=checks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_a_layer_gives_what_torch_gives_whole_in_pieces_and_with_pads(dtype: torch.dtype, stand_in: Any) -> None:
    from modeling.attention.layers import AttentionLayers

    part: Any = AttentionLayers([layer(d_model=24)]).to(dtype)
    x_BTD = drawn(20).to(dtype)
    valid_BT = torch.ones(2, 20, dtype=torch.bool)
    valid_BT[0, :7] = False
    outs: dict[str, list[Tensor]] = {}
    for kernel in ("torch", "fla"):
        part.set_execution(kernel=kernel)
        cache = part.new_cache(2, 20, dtype=dtype, device="cpu")
        pieces = torch.cat([part(piece, cache) for piece in x_BTD.split([11, 1, 1, 7], dim=1)], dim=1)
        outs[kernel] = [part(x_BTD), pieces, part(x_BTD, valid_BT=valid_BT)[valid_BT], cache[0].states["state"]]
    for found, wanted in zip(outs["fla"], outs["torch"], strict=True):
        assert found.dtype == wanted.dtype and 0 < relative_error(found, wanted) < 2e-2
    assert stand_in.calls == ["chunk", "token", "token", "chunk", "chunk", "chunk"]


def test_a_model_trains_by_it_under_autocast_and_its_other_layers_choose_themselves(
    monkeypatch: pytest.MonkeyPatch, stand_in: Any
) -> None:
    for check in ("check_kernel", "check_gradient"):
        monkeypatch.setattr(f"harness.runs.load.{check}", lambda name, device: None)
    gradients = {}
    tokens = torch.randint(100, (2, 17), generator=torch.Generator().manual_seed(0))
    for kernel in ("auto", "fla"):
        torch.manual_seed(0)
        model = gpt_from(["attention=gdn_3_1"], n_layers=4)
        execution = {"backend": "sdpa_math", "decode": "auto", "kernel": kernel}
        name = pin_execution(model, execution, device=torch.device("cpu"), precision=torch.bfloat16, trains=True)
        assert name == ("sdpa_math, fla" if kernel == "fla" else "sdpa_math")
        assert [each.kernel for each in model.attentions] == [*[kernel] * 3, "auto"]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        gradients[kernel] = {name: p.grad for name, p in model.named_parameters()}
    assert stand_in.calls == ["chunk"] * 3
    for name, wanted in gradients["auto"].items():
        assert wanted is not None and relative_error(gradients["fla"][name], wanted) < 0.1, name


def test_an_arm_of_a_study_and_a_benchmark_are_timed_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.runs.load.check_kernel", lambda name, device: None)
    where = plan(dtype=torch.bfloat16, cache_dtype=torch.bfloat16)
    config = load_train_config(["attention=gdn_3_1", "attention.kernel=fla"])
    subjects = [_subject("an arm", config, 99, where)]
    options = DecodeOptions(kernel="fla", device="cpu", step="eager", level="model", layers=4, peers=False)
    configs = [load_train_config([f"attention={variant}"]) for variant in ("gdn_3_1", "mha")]
    notes: list[str] = []
    subjects += make_subjects(configs, 99, options, where, notes)
    assert [subject.kernel for subject in subjects] == ["fla", "fla"] and notes[-1].startswith("no row of mha: ")
    assert {each.kernel for subject in subjects for each in subject.part.attentions} == {"fla", "auto"}


def test_where_it_cannot_run_it_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    model = gpt_from(["attention=gdn_3_1"])
    fla = {"backend": "auto", "decode": "auto", "kernel": "fla"}
    cpu = torch.device("cpu")
    with pytest.raises(UserError, match=r"kernel=fla needs a CUDA device and this one is cpu; take attention.kernel=torch"):
        pin_execution(model, fla, device=cpu, precision=torch.bfloat16)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'needs the package fla: pip install "fla-core>=0.6", or take attention.kernel=torch'):
        check_kernel("fla", "cuda")
    monkeypatch.setattr("harness.runs.load.check_kernel", lambda name, device: None)
    with pytest.raises(UserError, match=r"fla computes in bfloat16 or float16, not in torch.float32; take attention.kernel=t"):
        pin_execution(model, fla, device=cpu, precision=torch.float32)
    with pytest.raises(ValueError, match=r"fla computes the gated delta rule, which is not in this variant; use attention.k"):
        gpt_from(["attention=mla"]).set_execution(kernel="fla")
    with pytest.raises(ValueError, match=r"fla takes heads of up to 256 dimensions, and this variant's head_dim is 257: use"):
        gpt_from(["attention=gdn_3_1", "attention.kinds.delta.head_dim=257"]).set_execution(kernel="fla")


@pytest.mark.parametrize(("major", "triton", "wrong"), [(9, "3.6.0", True), (9, "3.7.1", False), (8, "3.6.0", False)])
def test_training_is_refused_where_the_compiler_makes_its_gradient_wrong(
    major: int, triton: str, wrong: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", {"triton": triton}.__getitem__)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    if wrong:
        with pytest.raises(
            ValueError, match=r"fla has no right gradient on Hopper with Triton 3.6.0 .* take attention.kernel=t"
        ):
            check_gradient("fla", torch.device("cuda"))
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name == "tilelang" else None)
    check_gradient("fla", torch.device("cuda"))
    check_gradient("triton", torch.device("cuda"))


SMALL = (4, 16, 64, 64)  # of model=small's gdn_3_1: other shapes are tuned anew


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_its_gradients_are_ours_on_a_gpu(compiled: bool) -> None:
    pytest.importorskip("fla")
    try:
        check_gradient("fla", torch.device("cuda"))
    except ValueError as error:
        pytest.skip(str(error))
    function = torch.compile(delta_rule_by_fla, fullgraph=True) if compiled else delta_rule_by_fla
    tensors = inputs(200, SMALL, device="cuda")
    found, wanted = results(function, tensors), results(delta_rule, [x.double() for x in tensors])
    assert max(relative_error(ours, right) for ours, right in zip(found, wanted, strict=True)) < 2e-2


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@torch.no_grad()
def test_prompts_and_tokens_are_ours_on_a_gpu(compiled: bool) -> None:
    pytest.importorskip("fla")
    function = torch.compile(delta_rule_by_fla, fullgraph=True, dynamic=False) if compiled else delta_rule_by_fla
    for tokens in (200, 1):
        tensors = inputs(tokens, SMALL, device="cuda")
        found, wanted = function(*tensors, scale=0.3), delta_rule(*(x.double() for x in tensors), scale=0.3)
        assert max(relative_error(ours, right) for ours, right in zip(found, wanted, strict=True)) < 1e-2
