"""attention.kernel=flashinfer: our caches as its pages, its plan and its refusals, with a stand-in for the package."""

from __future__ import annotations

import importlib.util
import sys
import types
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from harness.config.compose import load_train_config
from harness.decode.subjects import DecodePlan
from harness.errors import UserError
from harness.study.decode_times import decode_times
from modeling.generation import decode_step
from modeling.kernels import latent_decode_flashinfer as kernel
from modeling.kernels.decode_kernels import check_kernel
from modeling.kernels.latent_decode import latent_decode
from tests.kernels.test_latent_decode import TOLERANCE, Case, make_inputs
from tests.support.variants import gpt_from

SHAPE: dict[str, Any] = {"rank": 128, "rope": 64, "dtype": torch.float16}


class StandIn:
    """BatchMLAPagedAttentionWrapper's two methods over pages, in float64, from nothing but what it is given."""

    made: ClassVar[list[StandIn]] = []

    def __init__(self, workspace: Tensor, backend: str) -> None:
        assert workspace.dtype == torch.uint8 and backend == "fa2"
        self.plans: list[dict[str, Any]] = []
        StandIn.made.append(self)

    def plan(self, **plan: Any) -> None:
        assert all(plan[name].dtype == torch.int32 for name in ("qo_indptr", "kv_indptr", "kv_indices", "kv_len_arr"))
        assert plan["qo_indptr"].tolist() == list(range(len(plan["kv_len_arr"]) + 1)) and not plan["causal"]
        self.plans.append(plan)

    def run(self, *, q_nope: Tensor, q_pe: Tensor, ckv_cache: Tensor, kpe_cache: Tensor) -> Tensor:
        plan, rows = self.plans[-1], []
        assert q_nope.shape[1:] == (plan["num_heads"], plan["head_dim_ckv"]) and q_pe.shape[2] == plan["head_dim_kpe"]
        assert ckv_cache.shape[1] == kpe_cache.shape[1] == plan["page_size"]
        for b, length in enumerate(plan["kv_len_arr"].tolist()):
            pages = plan["kv_indices"][plan["kv_indptr"][b] : plan["kv_indptr"][b + 1]]
            c, k = (cache[pages].flatten(0, 1)[:length].double() for cache in (ckv_cache, kpe_cache))
            logits = q_nope[b].double() @ c.T + q_pe[b].double() @ k.T
            rows.append((plan["sm_scale"] * logits).softmax(-1) @ c)
        return torch.stack(rows).to(q_nope.dtype)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu"):
        return
    module = types.ModuleType("flashinfer.mla")
    module.BatchMLAPagedAttentionWrapper = StandIn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flashinfer", types.ModuleType("flashinfer"))
    monkeypatch.setitem(sys.modules, "flashinfer.mla", module)
    monkeypatch.setattr(StandIn, "made", [])
    kernel._plans.cache_clear()


@pytest.mark.parametrize(
    ("case", "page"),
    [
        (Case(4, slots=70, lengths=(70, 1, 33), **SHAPE), 1),  # buffers of 73 slots
        (Case(4, slots=70, lengths=(70, 1, 33), joint=True, **SHAPE), 1),
        (Case(4, slots=125, lengths=(125, 64, 65), **SHAPE), 64),  # of 128
        (Case(4, slots=37, lengths=(37, 8), **SHAPE), 8),  # of 40
        (Case(4, slots=96, lengths=(95,), **SHAPE), 32),
    ],
    ids=str,
)
def test_its_pages_are_our_caches_as_they_lie(case: Case, page: int) -> None:
    inputs = make_inputs(case, beyond=float("nan"))
    assert inputs.k_rope_BSP is not None
    pages, _ = kernel.as_pages(inputs.latent_BSL, inputs.k_rope_BSP)
    assert [x.data_ptr() for x in pages] == [inputs.latent_BSL.data_ptr(), inputs.k_rope_BSP.data_ptr()]
    assert [x.shape[1] for x in pages] == [page, page]
    assert inputs.error(latent_decode(*inputs.arguments, scale=inputs.scale, kernel="flashinfer")) < TOLERANCE[case.dtype]


def test_it_plans_once_for_all_layers_of_a_step_and_again_when_lengths_change() -> None:
    case = Case(4, slots=70, lengths=(70, 1, 33), **SHAPE)
    layers = [make_inputs(case, beyond=0.0, seed=seed) for seed in range(2)]
    for inputs in layers:
        assert inputs.error(latent_decode(*inputs.arguments, scale=inputs.scale, kernel="flashinfer")) < 1e-3
    (wrapper,) = StandIn.made
    assert len(wrapper.plans) == 1
    layers[0].lengths_B += torch.tensor([0, 1, 1])
    latent_decode(*layers[0].arguments, scale=layers[0].scale, kernel="flashinfer")
    assert [plan["kv_len_arr"].tolist() for plan in wrapper.plans] == [[70, 1, 33], [70, 2, 34]]


def test_rows_that_are_not_equally_far_apart_are_refused() -> None:
    inputs = make_inputs(Case(4, slots=70, lengths=(70, 1), **SHAPE), beyond=0.0)
    assert inputs.k_rope_BSP is not None
    inputs.k_rope_BSP = inputs.k_rope_BSP.contiguous()  # 70 slots apart, where the latents are 73
    with pytest.raises(
        ValueError, match=r"equally many slots apart, and the strides here are \(9344, 128, 1\) and \(4480, 64, 1\)"
    ):
        latent_decode(*inputs.arguments, scale=inputs.scale, kernel="flashinfer")


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        (Case(4, 192, 64, torch.float16), "kv_lora_rank 128 or 256 or 512 and qk_rope_head_dim 64, not 192 and 64"),
        (Case(4, 128, 0, torch.float16), "not 128 and 0; take attention.kernel=torch"),
        (Case(4, 128, 64, torch.float32), "attention.kernel=flashinfer computes in bfloat16 or float16, not in torch.float32"),
    ],
    ids=["rank", "not rotated", "float32"],
)
def test_shapes_that_it_has_not_are_refused(case: Case, sentence: str) -> None:
    inputs = make_inputs(case, beyond=0.0)
    with pytest.raises(ValueError, match=sentence):
        latent_decode(*inputs.arguments, scale=inputs.scale, kernel="flashinfer")


def test_without_the_package_the_sentence_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"needs the package flashinfer: pip install flashinfer-python, or take attention.kernel=t"
    ):
        check_kernel("flashinfer", "cuda")


def test_a_step_that_is_a_cuda_graph_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = gpt_from(["attention=mla"], n_layers=1).eval()
    model.set_execution(decode="absorbed", kernel="flashinfer")
    sentence = r"kernel=flashinfer plans each step on the host, which no CUDA graph can hold .* take step=eager or "
    with pytest.raises(ValueError, match=sentence):
        decode_step(model, [], "graph", torch.zeros(1, dtype=torch.long), None)
    monkeypatch.setattr(DecodePlan, "step_used", "graph")
    config = load_train_config(["attention=mla", "attention.kernel=flashinfer"])
    where: dict[str, Any] = {"contexts": [8], "batch_sizes": [1], "device": torch.device("cpu"), "dtype": torch.float32}
    with pytest.raises(UserError, match=f"an arm: attention.{sentence}"):
        decode_times({"an arm": config}, vocab_size=99, max_seconds=1.0, **where)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_it_equals_float64_on_a_gpu(heads: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("flashinfer")
    case = Case(heads, 512, 64, dtype, slots=1000, lengths=(1000, 1, 999, 64))
    inputs = make_inputs(case, beyond=0.0, device="cuda")
    assert inputs.error(latent_decode(*inputs.arguments, scale=inputs.scale, kernel="flashinfer")) < TOLERANCE[dtype]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(ValueError, match="plans each step on the host, which no CUDA graph can hold"):
        latent_decode(*inputs.arguments, scale=inputs.scale, kernel="flashinfer")
