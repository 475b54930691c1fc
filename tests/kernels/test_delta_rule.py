"""The gated delta rule: chunks, single tokens and transformers' own are one function."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from modeling.attention.contract import relative_error
from modeling.kernels.delta_rule import _operator, delta_rule, delta_rule_step

B, T, H, K, V = 2, 29, 3, 8, 5


def inputs(dtype: torch.dtype = torch.float64, decay: float = 2.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, generator=generator)

    q, k, v = (drawn(B, T, H, width) for width in (K, K, V))
    q, k = (x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    return [q, k, v, -decay * drawn(B, T, H).square(), drawn(B, T, H).sigmoid(), drawn(B, H, K, V)]


def by_token(*values: Tensor) -> tuple[Tensor, Tensor]:
    *sequences, state = values
    outs = []
    for t in range(T):
        out, state = delta_rule_step(*(x[:, t] for x in sequences), state, scale=0.3)  # type: ignore[arg-type,misc]
        outs.append(out)
    return torch.stack(outs, dim=1), state


@pytest.mark.parametrize("decay", [0.0, 2.0, 400.0])
@pytest.mark.parametrize("chunk", [1, 4, 29, 64])
def test_chunks_of_any_size_give_what_single_tokens_give(chunk: int, decay: float) -> None:
    """With a decay of exp(-400) too, whose inverse no float holds."""
    wanted = by_token(*inputs(decay=decay))
    found = delta_rule(*inputs(decay=decay), scale=0.3, chunk=chunk)
    for got, right in zip(found, wanted, strict=True):
        assert relative_error(got, right) < 1e-12


def test_gradients_of_chunks_are_those_of_single_tokens() -> None:
    grads = []
    for function in (by_token, lambda *values: delta_rule(*values, scale=0.3, chunk=8)):
        values: list[Any] = [x.requires_grad_() for x in inputs()]
        out, state = function(*values)
        ((out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum() + state.square().sum()).backward()
        grads.append([x.grad for x in values])
    for ours, right in zip(*grads, strict=True):
        assert relative_error(ours, right) < 1e-11


def test_compiled_it_is_the_same_in_a_graph_of_one_size_however_many_chunks() -> None:
    """Forward and backward, values and gradients of 8 and of 15 chunks: what is unrolled takes minutes to compile."""
    sizes: list[int] = []

    def count(graph: Any, _: Any) -> Any:
        sizes.append(len(graph.graph.nodes))
        return make_boxed_func(graph.forward)

    def results(function: Any, chunk: int) -> list[Tensor]:
        values: list[Any] = [x.requires_grad_() for x in inputs()]
        out, state = function(*values, scale=0.3, chunk=chunk)
        ((out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum() + state.square().sum()).backward()
        return [out, state, *(x.grad for x in values)]

    torch._dynamo.reset()
    compiled = torch.compile(delta_rule, backend=aot_autograd(fw_compiler=count), fullgraph=True, dynamic=False)
    for chunk in (4, 2):
        for found, wanted in zip(results(compiled, chunk), results(delta_rule, chunk), strict=True):
            assert relative_error(found, wanted) < 1e-11
    assert len(sizes) == 4 and sizes[:2] == sizes[2:]


def test_the_operator_that_a_compiler_sees_is_what_it_says() -> None:
    kept, added, first = (torch.randn(5, 3, K, width, dtype=torch.float64).requires_grad_() for width in (K, V, V))
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(_operator, (kept, added, first[0].detach().requires_grad_()), test_utils=checks)


def test_a_token_without_decay_and_strength_changes_nothing() -> None:
    q, k, v, log_decay, beta, state = inputs()
    log_decay[:, 10:20], beta[:, 10:20] = 0, 0
    kept = [*range(10), *range(20, T)]
    wanted, wanted_state = delta_rule(*(x[:, kept] for x in (q, k, v, log_decay, beta)), state, scale=1.0)
    found, found_state = delta_rule(q, k, v, log_decay, beta, state, scale=1.0)
    assert relative_error(found[:, kept], wanted) < 1e-12 and relative_error(found_state, wanted_state) < 1e-12


def test_it_is_transformers_rule() -> None:
    modeling = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    q, k, v, log_decay, beta, state = inputs(torch.float32)
    wanted, wanted_state = modeling.torch_recurrent_gated_delta_rule(
        q, k, v, log_decay, beta, initial_state=state, output_final_state=True
    )
    found, found_state = delta_rule(q, k, v, log_decay, beta, state, scale=K**-0.5, chunk=8)
    assert relative_error(found, wanted) < 1e-5 and relative_error(found_state, wanted_state) < 1e-5
