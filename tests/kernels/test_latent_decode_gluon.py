"""Gluon's decode kernel of heads by slots, for many heads: its own source against a softmax in float64.

Nothing but a Hopper GPU runs it: here it runs in tests/support/gluon_emulation.py, and faults are planted in it to see
whether the emulation would see them.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from modeling.kernels.decode_kernels import check_kernel
from modeling.kernels.latent_decode import latent_decode
from tests.kernels.test_latent_decode import HAS_TRITON, TOLERANCE, Case, Inputs, exact_rows, make_inputs
from tests.support import gluon_emulation

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed: pip install -r requirements-kernels.txt")
HALF, BFLOAT = torch.float16, torch.bfloat16
SHAPE: dict[str, Any] = {"rank": 512, "rope": 64}
# Lengths about the edges of a block (64), a pair of them (128) and a range; rows shorter than a block; ranges left empty.
GRID = (
    Case(64, dtype=BFLOAT, slots=200, lengths=(128, 1, 200), splits=1, **SHAPE),
    Case(64, dtype=HALF, slots=300, lengths=(65, 300), splits=1, **SHAPE),
    Case(16, dtype=HALF, slots=130, lengths=(63, 64, 129), splits=1, logit_std=1, **SHAPE),
    Case(128, dtype=BFLOAT, slots=520, lengths=(520, 7), splits=2, **SHAPE),
    Case(70, dtype=BFLOAT, slots=400, lengths=(385, 256, 50), splits=3, **SHAPE),
    Case(24, dtype=HALF, slots=600, lengths=(600, 513), splits=5, joint=True, **SHAPE),
)


def kernel_module() -> Any:
    from modeling.kernels import latent_decode_gluon_heads_triton

    return latent_decode_gluon_heads_triton


def emulated_by(kernel: Any, inputs: Inputs, splits: int, seed: int, **options: Any) -> Tensor:
    """out_BHL by a kernel's source on the CPU, its ranges joined here."""
    out_BHL = torch.full_like(inputs.q_latent_BHL, float("nan"), memory_format=torch.contiguous_format)
    B, H, L = out_BHL.shape
    partial_BHNL, lse_BHN = out_BHL, out_BHL
    if splits > 1:
        partial_BHNL, lse_BHN = torch.full((B, H, splits, L), float("nan")), torch.full((B, H, splits), float("nan"))
    describe = gluon_emulation.Descriptor
    grid, arguments, constants = kernel.program(
        *inputs.arguments, partial_BHNL, lse_BHN, scale=inputs.scale, splits=splits, describe=describe
    )
    gluon_emulation.launch(kernel.attend_kernel, grid, *arguments, seed=seed, **options, **constants)
    return out_BHL if splits == 1 else joined(partial_BHNL, lse_BHN)


def emulated(kernel: Any, inputs: Inputs, splits: int, seed: int) -> Tensor:
    return emulated_by(kernel, inputs, splits, seed)


def joined(partial_BHNL: Tensor, lse_BHN: Tensor) -> Tensor:
    """out_BHL of ranges, of which those with nothing in them were not written."""
    weights_BHN1 = (lse_BHN - lse_BHN.amax(-1, keepdim=True)).exp2().unsqueeze(-1)
    sums_BHNL = torch.where(weights_BHN1 > 0, partial_BHNL, 0.0)
    return (weights_BHN1 * sums_BHNL).sum(2) / weights_BHN1.sum(2)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("case", GRID, ids=str)
def test_in_any_order_of_events_the_kernel_equals_float64(case: Case, seed: int) -> None:
    inputs = make_inputs(case, beyond=float("nan"))
    assert inputs.error(emulated(kernel_module(), inputs, case.splits, seed)) < TOLERANCE[case.dtype]


def test_the_order_of_events_changes_no_bit() -> None:
    inputs = make_inputs(GRID[4], beyond=float("nan"))
    first, *others = (emulated(kernel_module(), inputs, 3, seed) for seed in range(4))
    assert all(torch.equal(first, other) for other in others)


def test_nan_within_a_row_is_seen_and_in_no_other_row() -> None:
    inputs = make_inputs(Case(16, dtype=BFLOAT, slots=300, lengths=(300, 300), **SHAPE), beyond=0.0)
    inputs.latent_BSL[0, 150:200] = float("nan")
    out_BHL = emulated(kernel_module(), inputs, 2, 0)
    assert out_BHL[0].isnan().all() and not out_BHL[1].isnan().any()


def planted(kernel: Any, tmp_path: Path, before: str, after: str) -> ModuleType:
    """A kernel's module with one place of its source changed."""
    source = Path(kernel.__file__).read_text(encoding="utf-8")
    assert source.count(before) == 1, source.count(before)
    file = tmp_path / "planted_gluon.py"
    file.write_text(source.replace(before, after), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("planted_gluon", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


WAITS = "    sums = warpgroup_mma_wait(0, deps=[sums])\n"
FAULTS = {
    "a half is given back before it was multiplied": (
        f"{WAITS}    mbarrier.arrive(shared.empty.index(0), count=1)\n",
        f"    mbarrier.arrive(shared.empty.index(0), count=1)\n{WAITS}",
    ),
    "the other group's weights are not waited for": ("    mbarrier.wait(shared.weights_ready.index(1), phase)\n", ""),
    "the other group's maximum is not waited for": ("    mbarrier.wait(shared.largest_ready.index(1), phase)\n", ""),
    "a copy is not waited for": ("        mbarrier.wait(shared.full.index(PIECES * part + i), phase)\n", ""),
    "a piece is copied twice": ("HALF * COLUMNS + PIECE * i]", "HALF * COLUMNS + PIECE * (i // 2)]"),
    "a half is waited for in the wrong phase": ("(pair & 1) ^ 1", "pair & 1"),
    "a half is never given back": ("    mbarrier.arrive(shared.empty.index(3), count=1)\n", ""),
    "too few bytes are expected": ("2 * SLOTS * (PIECE + ROTATED)", "2 * SLOTS * PIECE"),
    "a block passes its range's end": (
        "second = gl.minimum(place.start + 2 * SLOTS * pair + SLOTS, place.end - SLOTS)",
        "second = place.start + 2 * SLOTS * pair + SLOTS",
    ),
    "covered slots count twice": (
        "return gl.where(numbers[None, :] >= first, scores",
        "return gl.where(numbers[None, :] >= 0, scores",
    ),
    "a sum does not shrink with its maximum": ("return sums, total * shrink, m_1", "return sums, total, m_1"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_goes_wrong_in_such_kernels_is_seen_by_the_emulation(fault: str, tmp_path: Path) -> None:
    inputs = make_inputs(replace(GRID[0], slots=500, lengths=(500, 400)), beyond=float("nan"))
    kernel = planted(kernel_module(), tmp_path, *FAULTS[fault])

    def is_wrong(seed: int) -> bool:
        try:
            return not inputs.error(emulated(kernel, inputs, 1, seed)) < 2 * TOLERANCE[BFLOAT]
        except AssertionError:  # of a barrier
            return True

    assert any(is_wrong(seed) for seed in range(20))


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        (
            Case(64, 256, 64, BFLOAT),
            "gluon takes kv_lora_rank 512 and qk_rope_head_dim 64, not 256 and 64; take attention.kernel=",
        ),
        (Case(64, 512, 0, BFLOAT), "not 512 and 0; take attention.kernel=torch"),
        (
            Case(64, 512, 64, torch.float32),
            "computes in bfloat16 or float16, not in torch.float32; take attention.kernel=torch",
        ),
    ],
    ids=["narrow", "not rotated", "float32"],
)
def test_shapes_that_it_has_not_are_refused(case: Case, sentence: str) -> None:
    inputs = make_inputs(case, beyond=0.0)
    with pytest.raises(ValueError, match=sentence):
        latent_decode(*inputs.arguments, scale=inputs.scale, kernel="gluon")


def test_slots_that_the_copy_engine_cannot_reach_are_refused() -> None:
    inputs = make_inputs(Case(64, dtype=BFLOAT, **SHAPE), beyond=0.0)
    wide_BSK = torch.zeros(3, 70, 513, dtype=BFLOAT)
    inputs.latent_BSL = wide_BSK[..., :512]
    with pytest.raises(
        ValueError, match=r"begin at multiples of 16 bytes, and the latents begin .* take attention.kernel=triton"
    ):
        latent_decode(*inputs.arguments, scale=inputs.scale, kernel="gluon")


def test_other_generations_of_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    for capability in ((8, 0), (10, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        with pytest.raises(
            ValueError, match=rf"capability 9 and this one has {capability[0]}\.0; take attention.kernel=triton"
        ):
            check_kernel("gluon", "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    check_kernel("gluon", "cuda")
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # which runs the Triton kernel and not this one
    with pytest.raises(ValueError, match="needs a CUDA device and this one is cpu"):
        check_kernel("gluon", "cpu")


# --- on a Hopper GPU -------------------------------------------------------------------------------------------------

GPU_GRID = (
    *GRID,
    *(replace(case, splits=0) for case in GRID),
    *(
        Case(heads, dtype=dtype, slots=slots, lengths=lengths, splits=splits, **SHAPE)
        for heads, dtype in ((40, BFLOAT), (128, HALF), (128, BFLOAT))
        for slots, lengths in ((1000, (1000, 1, 999, 64)), (8192, (8192, 4097)))
        for splits in (0, 1, 7)
    ),
)


def run(case: Case, inputs: Inputs) -> Tensor:
    """By whichever of the two kernels takes such inputs."""
    from modeling.kernels.latent_decode_gluon_triton import launch

    if not case.splits:
        return latent_decode(*inputs.arguments, scale=inputs.scale, kernel="gluon")
    return launch(*inputs.arguments, scale=inputs.scale, splits=case.splits)


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_GRID, ids=str)
def test_the_compiled_kernel_equals_float64_on_a_gpu(case: Case) -> None:
    inputs = make_inputs(case, beyond=float("nan"), device="cuda")
    assert inputs.error(run(case, inputs)) < TOLERANCE[case.dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("splits", [0, 1])
def test_results_repeat_bit_for_bit_on_a_gpu(splits: int) -> None:
    case = Case(128, dtype=BFLOAT, slots=4000, lengths=tuple(range(100, 4000, 60)), splits=splits, **SHAPE)
    inputs = make_inputs(case, beyond=float("nan"), device="cuda")
    first = run(case, inputs)
    assert inputs.error(first) < TOLERANCE[BFLOAT]
    for _ in range(50):
        assert torch.equal(first, run(case, inputs))


@pytest.mark.gpu
def test_a_captured_launch_follows_lengths_that_change_on_the_device() -> None:
    case = Case(128, dtype=BFLOAT, slots=1000, lengths=(1000, 700), **SHAPE)
    inputs = make_inputs(case, beyond=float("nan"), device="cuda")
    run(case, inputs)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out_BHL = run(case, inputs)
    inputs.lengths_B.copy_(torch.tensor((10, 333)))
    inputs.exact_BHL = exact_rows(*(None if x is None else x.cpu() for x in inputs.arguments[:4]), (10, 333), inputs.scale)
    graph.replay()
    assert inputs.error(out_BHL) < TOLERANCE[BFLOAT]


@pytest.mark.gpu
def test_it_is_one_operator_of_a_compiled_graph_on_a_gpu() -> None:
    case = Case(128, dtype=BFLOAT, slots=300, lengths=(300, 129), **SHAPE)
    inputs = make_inputs(case, beyond=float("nan"), device="cuda")
    decode = torch.compile(latent_decode, fullgraph=True)
    assert inputs.error(decode(*inputs.arguments, scale=inputs.scale, kernel="gluon")) < TOLERANCE[BFLOAT]
