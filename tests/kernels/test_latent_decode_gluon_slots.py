"""Gluon's decode kernel of slots by heads, for latents of 16 bits and of 8: its own source against a softmax in float64.

It runs in tests/support/gluon_emulation.py. What that cannot run, the assembly that widens bytes, is executed here instruction
by instruction for every byte.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from modeling.kernels.latent_decode import latent_decode
from tests.kernels.test_latent_decode import HAS_TRITON, TOLERANCE, Case, Inputs, make_inputs
from tests.kernels.test_latent_decode_gluon import emulated_by, planted, run

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed: pip install -r requirements-kernels.txt")
HALF, BFLOAT, INT8, FP8 = torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn
SHAPE: dict[str, Any] = {"rank": 512, "rope": 64}
# Lengths about the edges of a block (64) and a range; rows shorter than a block; ranges left empty; more heads than a block's.
GRID = (
    Case(16, dtype=BFLOAT, slots=300, lengths=(128, 1, 300), splits=1, stored=INT8, **SHAPE),
    Case(16, dtype=BFLOAT, slots=500, lengths=(500, 129), splits=1, stored=FP8, logit_std=1, **SHAPE),
    Case(8, dtype=HALF, slots=700, lengths=(65, 700), splits=2, stored=INT8, **SHAPE),
    Case(24, dtype=BFLOAT, slots=900, lengths=(900, 7), splits=3, stored=FP8, **SHAPE),
    Case(24, dtype=BFLOAT, slots=900, lengths=(900, 7), splits=3, stored=INT8, **SHAPE),
    Case(16, dtype=BFLOAT, slots=300, lengths=(128, 1, 300), splits=1, **SHAPE),
    Case(24, dtype=HALF, slots=500, lengths=(65, 500), splits=2, joint=True, **SHAPE),
    Case(5, dtype=HALF, slots=700, lengths=(700, 129), splits=3, logit_std=1, **SHAPE),
)


def kernel_module() -> Any:
    from modeling.kernels import latent_decode_gluon_slots_triton

    return latent_decode_gluon_slots_triton


def planes(pairs: Tensor, INT8: bool) -> tuple[Tensor, Tensor]:
    """What `_planes` does, in torch."""
    bytes_ = pairs.contiguous().view(torch.int8 if INT8 else FP8).float().unflatten(-1, (-1, 2)).to(HALF)
    return bytes_[..., 0], bytes_[..., 1]


def as_they_lie(pairs: Tensor) -> tuple[Tensor, Tensor]:
    """What `_as_they_lie` does, in torch."""
    fours = pairs.contiguous().view(FP8).float().unflatten(-1, (-1, 2, 2)).to(HALF)
    return fours[..., 0, :].flatten(-2), fours[..., 1, :].flatten(-2)


def emulated(kernel: Any, inputs: Inputs, splits: int, seed: int) -> Tensor:
    """out_BHL by the kernel's source on the CPU, its ranges joined here."""
    return emulated_by(kernel, inputs, splits, seed, stand_ins={"_planes": planes, "_as_they_lie": as_they_lie})


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("case", GRID, ids=str)
def test_in_any_order_of_events_the_kernel_equals_float64(case: Case, seed: int) -> None:
    inputs = make_inputs(case, beyond=float("nan"))
    assert inputs.error(emulated(kernel_module(), inputs, case.splits, seed)) < TOLERANCE[case.dtype]


@pytest.mark.parametrize("case", [GRID[0], GRID[2], GRID[3], GRID[6]], ids=str)
def test_the_order_of_events_changes_no_bit(case: Case) -> None:
    inputs = make_inputs(case, beyond=float("nan"))
    first, *others = (emulated(kernel_module(), inputs, case.splits, seed) for seed in range(4))
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("stored", [INT8, FP8, None], ids=str)
def test_nan_within_a_row_is_seen_and_in_no_other_row(stored: torch.dtype | None) -> None:
    inputs = make_inputs(Case(16, dtype=BFLOAT, slots=300, lengths=(300, 300), stored=stored, **SHAPE), beyond=0.0)
    spoilt = inputs.latent_BSL if inputs.latent_scale_BS is None else inputs.latent_scale_BS
    spoilt[0, 150:200] = float("nan")
    out_BHL = emulated(kernel_module(), inputs, 1, 0)
    assert out_BHL[0].isnan().all() and not out_BHL[1].isnan().any()


@pytest.mark.parametrize("stored", [INT8, FP8], ids=str)
@pytest.mark.parametrize("factor", [1e6, 1e-6])
def test_neither_large_queries_nor_small_scales_leave_what_16_bits_hold(factor: float, stored: torch.dtype) -> None:
    """Queries by a factor and latents by its inverse: the same scores."""
    inputs = make_inputs(Case(16, dtype=BFLOAT, slots=200, lengths=(200, 77), stored=stored, **SHAPE), beyond=0.0)
    assert inputs.latent_scale_BS is not None
    exact = inputs.error(emulated(kernel_module(), inputs, 1, 0))
    power = 2.0 ** round(torch.tensor(factor).log2().item())
    inputs.q_latent_BHL *= power
    inputs.latent_scale_BS /= power
    inputs.exact_BHL /= power
    assert inputs.error(emulated(kernel_module(), inputs, 1, 0)) < 2 * exact < TOLERANCE[BFLOAT]


FAULTS = {  # with what latents are stored in
    "a stage is given back before it was multiplied": (
        INT8,
        "        even_0, even_1, even_2, even_3, odd_0, odd_1, odd_2, odd_3 = warpgroup_mma_wait(\n",
        "        mbarrier.arrive(shared.empty.index(stage), count=1)\n"
        "        even_0, even_1, even_2, even_3, odd_0, odd_1, odd_2, odd_3 = warpgroup_mma_wait(\n",
    ),
    "a copy is not waited for": (INT8, "        mbarrier.wait(shared.full.index(stage), (number // STAGES) & 1)\n", ""),
    "a stage is waited for in the wrong phase": (INT8, "((number // STAGES) & 1) ^ 1", "(number // STAGES) & 1"),
    "a stage is never given back": (INT8, "        mbarrier.arrive(shared.empty.index(stage), count=1)\n", ""),
    "too few bytes are expected": (INT8, "2 * SLOTS * (PARTS * PAIRS + ROTATED)", "2 * SLOTS * PARTS * PAIRS"),
    "both groups take one stage": (INT8, "        number = GROUPS * block + GROUP\n", "        number = GROUPS * block\n"),
    "a block passes its range's end": (
        INT8,
        "    slot = gl.minimum(start + SLOTS * (number // GROUPS), end - SLOTS)",
        "    slot = start + SLOTS * (number // GROUPS)",
    ),
    "covered slots count twice": (INT8, "gl.where(numbers[:, None] >= first, scores", "gl.where(numbers[:, None] >= 0, scores"),
    "a sum does not shrink with its maximum": (INT8, "parts = parts * shrink[None, :] + gl", "parts = parts + gl"),
    "scales are those of the block before": (
        INT8,
        "steps = _steps(place, gl.minimum(first + SLOTS, end - SLOTS), WIDE)",
        "steps = _steps(place, gl.minimum(first, end - SLOTS), WIDE)",
    ),
    "planes are exchanged": (INT8, "    return even_sums, odd_sums\n", "    return odd_sums, even_sums\n"),
    "a head's size is forgotten": (FP8, "scores * step * size + rotated", "scores * step + rotated"),
    "a copy that was begun before is begun again": (
        None,
        "for number in range(STAGES, GROUPS",
        "for number in range(STAGES - 1, GROUPS",
    ),
    "the other group's sums are not waited for": (INT8, "            mbarrier.wait(shared.done, 0)\n", ""),
    "the other group's sums have another weight": (INT8, "its = gl.exp2(its - largest)", "its = own"),
    "the other group's sums are left where a copy comes": (
        INT8,
        "last = (GROUPS * (place.per_range // SLOTS) - 1) % STAGES",
        "last = (GROUPS * (place.per_range // SLOTS) - 2) % STAGES",
    ),
    "the other group's maximum is forgotten": (INT8, "            m = largest\n", ""),
    "planes of queries are neighbours": (FP8, "columns = 2 * columns - columns % 2", "columns = 2 * columns"),
    "planes of queries are exchanged": (FP8, "_load_queries(q_latent + 2, head", "_load_queries(q_latent, head"),
    "the last digits are forgotten": (INT8, "(high * 128 + low)", "(high * 128)"),
    "a half is copied twice": (None, "[place.row, slot, part * PAIRS]", "[place.row, slot, 0]"),
    "halves are exchanged": (None, "2 * stage + 2 * FIRST // PAIRS", "2 * stage + 1 - 2 * FIRST // PAIRS"),
    "half of a part is multiplied twice": (None, "2 * FIRST % PAIRS + PART, PART", "2 * FIRST % PAIRS, PART"),
    "a stage of halves is given back too early": (
        None,
        "        even_0, even_1, even_2, even_3, odd_0, odd_1, odd_2, odd_3 = warpgroup_mma_wait(\n",
        "        mbarrier.arrive(shared.empty.index(stage), count=1)\n"
        "        even_0, even_1, even_2, even_3, odd_0, odd_1, odd_2, odd_3 = warpgroup_mma_wait(\n",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_goes_wrong_in_such_kernels_is_seen_by_the_emulation(fault: str, tmp_path: Any) -> None:
    stored, *change = FAULTS[fault]
    inputs = make_inputs(Case(16, dtype=BFLOAT, slots=900, lengths=(900, 780), stored=stored, **SHAPE), beyond=float("nan"))
    splits = 2 if "maximum is forgotten" in fault else 1  # which matters to those who join ranges
    kernel = planted(kernel_module(), tmp_path, *change)

    def is_wrong(seed: int) -> bool:
        try:
            return not inputs.error(emulated(kernel, inputs, splits, seed)) < 2 * TOLERANCE[BFLOAT]
        except AssertionError:  # of a barrier
            return True

    assert any(is_wrong(seed) for seed in range(10))


# --- the assembly ----------------------------------------------------------------------------------------------------


def run_assembly(text: str, word: int) -> tuple[int, int]:
    """($0, $1) of a few PTX instructions, $2 being `word`; numbers are 32-bit words, halves of 16 bits."""
    registers: dict[str, int] = {"$2": word}

    def halves(x: int) -> tuple[int, int]:
        return x & 0xFFFF, x >> 16

    def as_float16(x: int) -> Tensor:
        return torch.tensor(halves(x), dtype=torch.int32).to(torch.int16).view(HALF)

    def of_float16(x: Tensor) -> int:
        low, high = (int(each) & 0xFFFF for each in x.view(torch.int16))
        return low | high << 16

    def e4m3x2(x: int) -> int:
        return of_float16(torch.tensor([x & 255, x >> 8], dtype=torch.uint8).view(FP8).float().to(HALF))

    def prmt(a: int, b: int, selector: int) -> int:
        pool = a.to_bytes(4, "little") + b.to_bytes(4, "little")
        return int.from_bytes(bytes(pool[selector >> 4 * i & 7] for i in range(4)), "little")

    known: dict[str, Callable[..., int]] = {
        "mov.b32": lambda x: x,
        "xor.b32": lambda a, b: a ^ b,
        "prmt.b32": prmt,
        "sub.rn.f16x2": lambda a, b: of_float16(as_float16(a) - as_float16(b)),
        "cvt.rn.f16x2.e4m3x2": e4m3x2,
    }
    for line in filter(None, map(str.strip, text.strip().strip("{}").split(";"))):
        name, rest = line.split(None, 1)
        if name == ".reg":
            continue
        if rest.startswith("{"):
            targets, source = re.findall(r"[$\w]+", rest)[:2], re.findall(r"[$\w]+", rest)[2]
            registers |= zip(targets, halves(registers[source]), strict=True)
            continue
        target, *operands = (each.strip() for each in rest.split(","))
        registers[target] = known[name](*(registers[x] if x in registers else int(x, 0) for x in operands))
    return registers["$0"], registers["$1"]


def words_of(shift: int) -> Tensor:
    """Every byte in every place, beside others."""
    everything = torch.arange(256, dtype=torch.uint8)
    return torch.stack([everything, everything.roll(shift), everything.flip(0), everything.roll(-shift)], dim=1)


@pytest.mark.parametrize(
    ("name", "number", "wanted"),
    [
        ("_planes", 0, functools.partial(planes, INT8=True)),
        ("_planes", 1, functools.partial(planes, INT8=False)),
        ("_as_they_lie", 0, as_they_lie),
    ],
    ids=["int8", "fp8", "fp8 as it lies"],
)
def test_the_assembly_widens_every_byte_exactly(name: str, number: int, wanted: Callable[..., tuple[Tensor, Tensor]]) -> None:
    source = inspect.getsource(getattr(kernel_module(), name).fn)
    text = re.findall(r'"""\n\s*(\{.*?\})\s*"""', source, re.DOTALL)[number]
    for shift in (0, 37, 101, 200):
        words = words_of(shift)
        found = [run_assembly(text, int(word) & 0xFFFFFFFF) for word in words.view(torch.int32)[:, 0]]
        for right, got in zip(wanted(words.view(torch.int16)), zip(*found, strict=True), strict=True):
            made = torch.tensor([[x & 0xFFFF, x >> 16] for x in got], dtype=torch.int32).to(torch.int16).view(HALF)
            assert torch.equal(made.nan_to_num(nan=9.0), right.nan_to_num(nan=9.0))


# --- on a Hopper GPU -------------------------------------------------------------------------------------------------

GPU_GRID = tuple(
    Case(heads, dtype=dtype, slots=slots, lengths=lengths, splits=splits, stored=stored, logit_std=logit_std, **SHAPE)
    for stored in (INT8, FP8, None)
    for heads, dtype, logit_std in ((16, BFLOAT, 30), (5, HALF, 30), (128 if stored else 32, BFLOAT, 30), (24, HALF, 1))
    for slots, lengths in ((1000, (1000, 1, 999, 64)), (8192, (8192, 4097)))
    for splits in (0, 1, 7)
)


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_GRID, ids=str)
def test_the_compiled_kernel_equals_float64_on_a_gpu(case: Case) -> None:
    inputs = make_inputs(case, beyond=float("nan"), device="cuda")
    assert inputs.error(run(case, inputs)) < TOLERANCE[case.dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("splits", [0, 1])
@pytest.mark.parametrize("stored", [INT8, FP8, None], ids=str)
def test_results_repeat_bit_for_bit_on_a_gpu(stored: torch.dtype | None, splits: int) -> None:
    lengths = tuple(range(100, 4000, 60))
    case = Case(16, dtype=BFLOAT, slots=4000, lengths=lengths, splits=splits, stored=stored, **SHAPE)
    inputs = make_inputs(case, beyond=float("nan"), device="cuda")
    first = run(case, inputs)
    assert inputs.error(first) < TOLERANCE[BFLOAT]
    for _ in range(50):
        assert torch.equal(first, run(case, inputs))


@pytest.mark.gpu
@pytest.mark.parametrize("splits", [1, 7])
@pytest.mark.parametrize("stored", [INT8, FP8, None], ids=str)
def test_a_captured_launch_follows_lengths_that_change_on_the_device(stored: torch.dtype | None, splits: int) -> None:
    case = Case(16, dtype=BFLOAT, slots=1000, lengths=(1000, 700), splits=splits, stored=stored, **SHAPE)
    given = [make_inputs(replace(case, lengths=lengths), beyond=0.0, device="cuda") for lengths in ((1000, 700), (10, 333))]
    inputs = make_inputs(case, beyond=0.0, device="cuda")
    run(case, inputs)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out_BHL = run(case, inputs)
    for other in 20 * given:
        for to, source in zip(inputs.arguments, other.arguments, strict=True):
            if to is not None and source is not None:
                to.copy_(source)
        graph.replay()
        assert other.error(out_BHL) < TOLERANCE[BFLOAT]


@pytest.mark.gpu
@pytest.mark.parametrize("stored", [INT8, FP8, None], ids=str)
def test_it_is_one_operator_of_a_compiled_graph_on_a_gpu(stored: torch.dtype | None) -> None:
    case = Case(16, dtype=BFLOAT, slots=300, lengths=(300, 129), stored=stored, **SHAPE)
    inputs = make_inputs(case, beyond=float("nan"), device="cuda")
    decode = torch.compile(latent_decode, fullgraph=True)
    assert inputs.error(decode(*inputs.arguments, scale=inputs.scale, kernel="gluon")) < TOLERANCE[BFLOAT]
