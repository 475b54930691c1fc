"""Gluon's decode kernel of slots by heads, for latents of 8 bits and of 16: its own source against a softmax in float64.

It runs in tests/support/gluon_emulation.py. What that cannot run, the assembly that widens bytes, is executed here instruction
by instruction for every byte.
"""

from __future__ import annotations

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
from tests.kernels.test_latent_decode_gluon import joined, planted
from tests.support import gluon_emulation

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed: pip install -r requirements-kernels.txt")
HALF, BFLOAT, INT8, FP8 = torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn
SHAPE: dict[str, Any] = {"rank": 512, "rope": 64}
# Lengths about the edges of a block (64) and a range; rows shorter than a block; ranges left empty; more heads than a block's.
GRID = (
    Case(16, dtype=BFLOAT, slots=300, lengths=(128, 1, 300), splits=1, stored=INT8, **SHAPE),
    Case(16, dtype=BFLOAT, slots=500, lengths=(500, 129), splits=1, stored=FP8, logit_std=1, **SHAPE),
    Case(8, dtype=HALF, slots=700, lengths=(65, 700), splits=2, stored=INT8, **SHAPE),
    Case(24, dtype=BFLOAT, slots=900, lengths=(900, 7), splits=3, stored=FP8, **SHAPE),
)
# Of 16 bits there is only the lean form; of both, one program a row and several.
LEAN_GRID = (
    *GRID[:3],
    Case(24, dtype=BFLOAT, slots=900, lengths=(900, 7), splits=3, stored=INT8, **SHAPE),
    Case(16, dtype=BFLOAT, slots=300, lengths=(128, 1, 300), splits=1, **SHAPE),
    Case(24, dtype=HALF, slots=500, lengths=(65, 500), splits=2, joint=True, **SHAPE),
    Case(5, dtype=HALF, slots=700, lengths=(700, 129), splits=3, logit_std=1, **SHAPE),
)
FORMS = [(case, False) for case in GRID] + [(case, True) for case in LEAN_GRID]
BY_FORM = pytest.mark.parametrize(
    ("case", "lean"), FORMS, ids=lambda x: ("lean" if x else "") if isinstance(x, bool) else str(x)
)


def kernel_module() -> Any:
    from modeling.kernels import latent_decode_gluon_words_triton

    return latent_decode_gluon_words_triton


def planes(pairs: Tensor, INT8: bool) -> tuple[Tensor, Tensor]:
    """What `_planes` does, in torch."""
    bytes_ = pairs.contiguous().view(torch.int8 if INT8 else FP8).float().unflatten(-1, (-1, 2)).to(HALF)
    return bytes_[..., 0], bytes_[..., 1]


def emulated(kernel: Any, inputs: Inputs, programs: int, seed: int, lean: bool) -> Tensor:
    """out_BHL by the kernel's source on the CPU, its ranges joined here."""
    q_latent_BHL, q_rope_BHP, latent_BSL, k_rope_BSP, lengths_B, latent_scale_BS = inputs.arguments
    B, H, L = q_latent_BHL.shape
    ranges = programs * kernel.groups_of(kernel.tile_of(latent_BSL))
    partial_BHNL, lse_BHN = torch.full((B, H, ranges, L), float("nan")), torch.full((B, H, ranges), float("nan"))
    if alone := lean and programs == 1:
        partial_BHNL = lse_BHN = torch.full((B, H, L), float("nan"), dtype=q_latent_BHL.dtype)
    grid, arguments, constants = kernel.program(
        q_latent_BHL,
        q_rope_BHP,
        latent_BSL,
        k_rope_BSP,
        lengths_B,
        latent_scale_BS,
        partial_BHNL,
        lse_BHN,
        scale=inputs.scale,
        programs=programs,
        lean=lean,
        describe=gluon_emulation.Descriptor,
    )
    gluon_emulation.launch(
        kernel.attend_words_kernel,
        grid,
        *arguments,
        seed=seed,
        stand_ins={"_planes": planes, "_let_next_begin": lambda: None},
        **constants,
    )
    return partial_BHNL if alone else joined(partial_BHNL, lse_BHN)


@pytest.mark.parametrize("seed", range(3))
@BY_FORM
def test_in_any_order_of_events_the_kernel_equals_float64(case: Case, lean: bool, seed: int) -> None:
    inputs = make_inputs(case, beyond=float("nan"))
    assert inputs.error(emulated(kernel_module(), inputs, case.splits, seed, lean)) < TOLERANCE[case.dtype]


@pytest.mark.parametrize("case", LEAN_GRID[-3:-1], ids=str)
def test_of_16_bits_a_program_may_have_two_groups_too(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, inputs = kernel_module(), make_inputs(case, beyond=float("nan"))
    monkeypatch.setattr(kernel, "WIDE_TILE", replace(kernel.WIDE_TILE, slots=128))
    assert all(inputs.error(emulated(kernel, inputs, case.splits, seed, True)) < TOLERANCE[case.dtype] for seed in range(3))


@pytest.mark.parametrize(("case", "lean"), [(GRID[2], False), (LEAN_GRID[0], True), (LEAN_GRID[5], True)], ids=str)
def test_the_order_of_events_changes_no_bit(case: Case, lean: bool) -> None:
    inputs = make_inputs(case, beyond=float("nan"))
    first, *others = (emulated(kernel_module(), inputs, case.splits, seed, lean) for seed in range(4))
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize(("stored", "lean"), [(INT8, False), (INT8, True), (None, True)])
def test_nan_within_a_row_is_seen_and_in_no_other_row(stored: torch.dtype | None, lean: bool) -> None:
    inputs = make_inputs(Case(16, dtype=BFLOAT, slots=300, lengths=(300, 300), stored=stored, **SHAPE), beyond=0.0)
    spoilt = inputs.latent_BSL if inputs.latent_scale_BS is None else inputs.latent_scale_BS
    spoilt[0, 150:200] = float("nan")
    out_BHL = emulated(kernel_module(), inputs, 1, 0, lean)
    assert out_BHL[0].isnan().all() and not out_BHL[1].isnan().any()


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("factor", [1e6, 1e-6])
def test_neither_large_queries_nor_small_scales_leave_what_16_bits_hold(factor: float, lean: bool) -> None:
    """Queries by a factor and latents by its inverse: the same scores."""
    inputs = make_inputs(Case(16, dtype=BFLOAT, slots=200, lengths=(200, 77), stored=INT8, **SHAPE), beyond=0.0)
    assert inputs.latent_scale_BS is not None
    exact = inputs.error(emulated(kernel_module(), inputs, 1, 0, lean))
    power = 2.0 ** round(torch.tensor(factor).log2().item())
    inputs.q_latent_BHL *= power
    inputs.latent_scale_BS /= power
    inputs.exact_BHL /= power
    assert inputs.error(emulated(kernel_module(), inputs, 1, 0, lean)) < 2 * exact < TOLERANCE[BFLOAT]


FAULTS = {
    "a stage is given back before it was multiplied": (
        "        even_0, even_1, even_2, even_3, odd_0, odd_1, odd_2, odd_3 = warpgroup_mma_wait(\n",
        "        mbarrier.arrive(shared.empty.index(stage), count=1)\n"
        "        even_0, even_1, even_2, even_3, odd_0, odd_1, odd_2, odd_3 = warpgroup_mma_wait(\n",
    ),
    "a copy is not waited for": ("        mbarrier.wait(shared.full.index(stage), (number // STAGES) & 1)\n", ""),
    "a stage is waited for in the wrong phase": ("((number // STAGES) & 1) ^ 1", "(number // STAGES) & 1"),
    "a stage is never given back": ("        mbarrier.arrive(shared.empty.index(stage), count=1)\n", ""),
    "too few bytes are expected": ("2 * SLOTS * (PARTS * PAIRS + ROTATED)", "2 * SLOTS * PARTS * PAIRS"),
    "both groups take one stage": ("        number = GROUPS * block + GROUP\n", "        number = GROUPS * block\n"),
    "a block passes its range's end": (
        "    slot = gl.minimum(start + SLOTS * (number // GROUPS), end - SLOTS)",
        "    slot = start + SLOTS * (number // GROUPS)",
    ),
    "covered slots count twice": ("gl.where(numbers[:, None] >= first, scores", "gl.where(numbers[:, None] >= 0, scores"),
    "a sum does not shrink with its maximum": ("parts = parts * shrink[None, :] + gl", "parts = parts + gl"),
    "scales are those of the block before": (
        "steps = _steps(place, gl.minimum(first + SLOTS, end - SLOTS), WIDE)",
        "steps = _steps(place, gl.minimum(first, end - SLOTS), WIDE)",
    ),
    "planes are exchanged": ("    return even_sums, odd_sums\n", "    return odd_sums, even_sums\n"),
    "a head's size is forgotten": ("scores * step * size + rotated", "scores * step + rotated"),
}
LEAN_FAULTS = {  # with what latents are stored in
    "a copy that was begun before is begun again": (
        None,
        "for number in range(AHEAD, GROUPS",
        "for number in range(AHEAD - 1, GROUPS",
    ),
    "the other group's sums are not waited for": (INT8, "            mbarrier.wait(shared.done, 0)\n", ""),
    "the other group's sums have another weight": (INT8, "its = gl.exp2(its - largest)", "its = own"),
    "the other group's sums are left where a copy comes": (
        INT8,
        "last = (GROUPS * (place.per_range // SLOTS) - 1) % STAGES",
        "last = (GROUPS * (place.per_range // SLOTS) - 2) % STAGES",
    ),
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


@pytest.mark.parametrize("fault", [*FAULTS, *LEAN_FAULTS])
def test_what_goes_wrong_in_such_kernels_is_seen_by_the_emulation(fault: str, tmp_path: Any) -> None:
    lean = fault in LEAN_FAULTS
    stored, *change = LEAN_FAULTS[fault] if lean else (INT8, *FAULTS[fault])
    inputs = make_inputs(Case(16, dtype=BFLOAT, slots=900, lengths=(900, 780), stored=stored, **SHAPE), beyond=float("nan"))
    kernel = planted(kernel_module(), tmp_path, *change)

    def is_wrong(seed: int) -> bool:
        try:
            return not inputs.error(emulated(kernel, inputs, 1, seed, lean)) < 2 * TOLERANCE[BFLOAT]
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


@pytest.mark.parametrize("stored", [INT8, FP8], ids=str)
def test_the_assembly_widens_every_byte_exactly(stored: torch.dtype) -> None:
    source = inspect.getsource(kernel_module()._planes.fn)
    texts = re.findall(r'"""\n\s*(\{.*?\})\s*"""', source, re.DOTALL)
    assert len(texts) == 2
    everything = torch.arange(256, dtype=torch.uint8)
    for shift in (0, 37, 101, 200):  # each byte in each place beside others
        words = torch.stack([everything, everything.roll(shift), everything.flip(0), everything.roll(-shift)], dim=1)
        even, odd = planes(words.view(torch.int16), stored == INT8)
        found = [run_assembly(texts[stored == FP8], int(word) & 0xFFFFFFFF) for word in words.view(torch.int32)[:, 0]]
        for wanted, got in zip((even, odd), zip(*found, strict=True), strict=True):
            made = torch.tensor([[x & 0xFFFF, x >> 16] for x in got], dtype=torch.int32).to(torch.int16).view(HALF)
            assert torch.equal(made.nan_to_num(nan=9.0), wanted.nan_to_num(nan=9.0))


# --- on a Hopper GPU -------------------------------------------------------------------------------------------------

GPU_GRID = tuple(
    (Case(heads, dtype=dtype, slots=slots, lengths=lengths, splits=programs, stored=stored, **SHAPE), lean)
    for heads, dtype in ((16, BFLOAT), (5, HALF), (40, BFLOAT))
    for slots, lengths in ((1000, (1000, 1, 999, 64)), (8192, (8192, 4097)))
    for programs in (0, 1, 7)
    for stored, lean in ((INT8, False), (FP8, False), (INT8, True), (FP8, True), (None, True))
)


def run(case: Case, inputs: Inputs, lean: bool) -> Tensor:
    kernel = kernel_module()
    programs = case.splits or kernel.programs_for(inputs.q_latent_BHL, inputs.latent_BSL)
    return kernel.launch(*inputs.arguments, scale=inputs.scale, programs=programs, lean=lean)


@pytest.mark.gpu
@pytest.mark.parametrize(("case", "lean"), GPU_GRID, ids=str)
def test_the_compiled_kernel_equals_float64_on_a_gpu(case: Case, lean: bool) -> None:
    inputs = make_inputs(case, beyond=float("nan"), device="cuda")
    assert inputs.error(run(case, inputs, lean)) < TOLERANCE[case.dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("programs", [0, 1])
@pytest.mark.parametrize(("stored", "lean"), [(INT8, False), (INT8, True), (None, True)])
def test_results_repeat_bit_for_bit_on_a_gpu(stored: torch.dtype | None, lean: bool, programs: int) -> None:
    lengths = tuple(range(100, 4000, 60))
    case = Case(16, dtype=BFLOAT, slots=4000, lengths=lengths, splits=programs, stored=stored, **SHAPE)
    inputs = make_inputs(case, beyond=float("nan"), device="cuda")
    first = run(case, inputs, lean)
    assert inputs.error(first) < TOLERANCE[BFLOAT]
    for _ in range(50):
        assert torch.equal(first, run(case, inputs, lean))


@pytest.mark.gpu
@pytest.mark.parametrize("programs", [1, 7])
@pytest.mark.parametrize("stored", [INT8, None], ids=str)
def test_a_captured_lean_launch_follows_lengths_that_change_on_the_device(stored: torch.dtype | None, programs: int) -> None:
    case = Case(16, dtype=BFLOAT, slots=1000, lengths=(1000, 700), splits=programs, stored=stored, **SHAPE)
    given = [make_inputs(replace(case, lengths=lengths), beyond=0.0, device="cuda") for lengths in ((1000, 700), (10, 333))]
    inputs = make_inputs(case, beyond=0.0, device="cuda")
    run(case, inputs, True)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out_BHL = run(case, inputs, True)
    for other in 20 * given:
        for to, source in zip(inputs.arguments, other.arguments, strict=True):
            if to is not None and source is not None:
                to.copy_(source)
        graph.replay()
        assert other.error(out_BHL) < TOLERANCE[BFLOAT]


@pytest.mark.gpu
@pytest.mark.parametrize("stored", [INT8, FP8, None], ids=str)
def test_by_its_name_it_is_one_operator_of_a_compiled_graph_on_a_gpu(stored: torch.dtype | None) -> None:
    case = Case(16, dtype=BFLOAT, slots=300, lengths=(300, 129), stored=stored, **SHAPE)
    inputs = make_inputs(case, beyond=float("nan"), device="cuda")
    decode = torch.compile(latent_decode, fullgraph=True)
    assert inputs.error(decode(*inputs.arguments, scale=inputs.scale, kernel="gluon_slots")) < TOLERANCE[BFLOAT]
