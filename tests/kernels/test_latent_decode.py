"""The decode kernel of latent attention and its torch reference against a softmax in float64, written out row by row.

Without a GPU the Triton kernel runs in Triton's interpreter: in one subprocess (this file as a program), because
TRITON_INTERPRET must be set before triton is imported and nothing else in the session may see it. The interpreter
multiplies bfloat16 wrongly (Triton 3.6 to 3.9), so that type is tested on a GPU only.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from modeling.attention.quantisation import quantise
from modeling.kernels.availability import HAS_GLUON
from modeling.kernels.decode_kernels import (
    DELTA_RULES,
    EXPLICIT,
    KERNELS,
    OTHERS,
    Kernel,
    check_dtype,
    check_kernel,
    check_widths,
    select_kernel,
)
from modeling.kernels.latent_decode import latent_decode
from tests.support.forks import Forks

ROOT = Path(__file__).resolve().parents[2]
HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed: pip install -r requirements-kernels.txt")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@dataclass(frozen=True)
class Case:
    """A shape; lengths of the rows; how many ranges a row is split into (0: the plan's choice); how large logits are."""

    heads: int
    rank: int
    rope: int
    dtype: torch.dtype
    slots: int = 70
    lengths: tuple[int, ...] = (70, 1, 33)
    splits: int = 0
    wide: bool = False
    logit_std: float = 30.0
    joint: bool = False  # latent and rotated key side by side in one buffer
    stored: torch.dtype | None = None  # 8 bits of the latents, with a scale a slot

    def __str__(self) -> str:
        name = f"h{self.heads}-{self.rank}+{self.rope}-{str(self.dtype).removeprefix('torch.')}-s{self.slots}"
        name += f"-split{self.splits or ''}" + "-wide" * self.wide + "-joint" * self.joint
        name += "" if self.stored is None else f"-{str(self.stored).removeprefix('torch.')}"
        return name + (f"-std{self.logit_std:g}" if self.logit_std != 30 else "")


HALF, SINGLE = torch.float16, torch.float32
GRID = (
    Case(1, 64, 0, SINGLE),
    Case(1, 64, 16, HALF, splits=1),
    Case(2, 64, 16, SINGLE, splits=1, logit_std=1),
    Case(2, 80, 48, HALF, splits=3, logit_std=1),
    Case(5, 80, 16, SINGLE, splits=2),
    Case(5, 192, 48, SINGLE, slots=200, lengths=(200, 1, 129), splits=5),
    Case(5, 64, 64, SINGLE, joint=True, splits=2),
    Case(16, 192, 0, HALF, splits=1),
    Case(16, 512, 64, HALF, lengths=(70, 1)),
    Case(16, 512, 64, SINGLE, slots=50, lengths=(50, 18), splits=3),
    Case(16, 272, 0, SINGLE, slots=300, lengths=(300, 20), splits=19),
    Case(16, 384, 64, SINGLE, slots=50, lengths=(49, 16), splits=1),
    Case(24, 80, 64, SINGLE, slots=140, lengths=(140, 3), splits=2, wide=True),
    Case(24, 192, 48, SINGLE, logit_std=1),
    Case(64, 320, 16, SINGLE, slots=130, lengths=(130, 65), splits=2, wide=True),
    Case(64, 64, 0, HALF, splits=1, wide=True),
    Case(128, 512, 64, SINGLE, slots=100, lengths=(100,), splits=2, wide=True),
    Case(128, 64, 16, SINGLE, lengths=(70, 64), splits=1),
    Case(1, 64, 0, SINGLE, stored=torch.int8),
    Case(5, 80, 16, SINGLE, splits=2, stored=torch.float8_e4m3fn),
    Case(16, 192, 48, HALF, splits=1, stored=torch.int8, logit_std=1),
    Case(16, 512, 64, SINGLE, slots=50, lengths=(50, 18), splits=3, stored=torch.int8),
    Case(16, 512, 64, HALF, lengths=(70, 1), stored=torch.float8_e4m3fn, logit_std=1),
    Case(24, 80, 64, SINGLE, slots=140, lengths=(140, 3), splits=2, wide=True, stored=torch.float8_e4m3fn),
)


@dataclass
class Inputs:
    q_latent_BHL: Tensor
    q_rope_BHP: Tensor | None
    latent_BSL: Tensor
    k_rope_BSP: Tensor | None
    lengths_B: Tensor
    scale: float
    exact_BHL: Tensor
    latent_scale_BS: Tensor | None = None

    @property
    def arguments(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor, Tensor | None]:
        return self.q_latent_BHL, self.q_rope_BHP, self.latent_BSL, self.k_rope_BSP, self.lengths_B, self.latent_scale_BS

    def error(self, out_BHL: Tensor) -> float:
        """||out - exact|| / ||exact||; nan if anything is nan."""
        return float((out_BHL.double().cpu() - self.exact_BHL).norm() / self.exact_BHL.norm())


def exact_rows(
    q_latent_BHL: Tensor, q_rope_BHP: Tensor | None, latent_BSL: Tensor, k_rope_BSP: Tensor | None, lengths: Any, scale: float
) -> Tensor:
    """The definition in float64, one row after another, over its own slots alone."""
    rows = []
    for b, length in enumerate(lengths):
        latent_NL = latent_BSL[b, :length].double()
        logits_HN = q_latent_BHL[b].double() @ latent_NL.T
        if q_rope_BHP is not None and k_rope_BSP is not None:
            logits_HN = logits_HN + q_rope_BHP[b].double() @ k_rope_BSP[b, :length].double().T
        weights_HN = torch.exp(scale * (logits_HN - logits_HN.amax(dim=1, keepdim=True)))
        rows.append(weights_HN / weights_HN.sum(dim=1, keepdim=True) @ latent_NL)
    return torch.stack(rows)


def make_inputs(case: Case, *, beyond: float, device: str = "cpu", seed: int = 0) -> Inputs:
    """Random tensors with `beyond` in every slot past a row's length; the caches are views into longer buffers."""
    generator = torch.Generator().manual_seed(seed)
    B, L, P = len(case.lengths), case.rank, case.rope
    scale = 0.07

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q_BHK = (normal(B, case.heads, L + P) * case.logit_std / (scale * (L + P) ** 0.5)).to(case.dtype)
    kv_BSK = normal(B, case.slots + 3, L + P).to(case.dtype)
    for b, length in enumerate(case.lengths):
        kv_BSK[b, length:] = beyond
    latent_BSL, k_rope_BSP = kv_BSK[..., :L], kv_BSK[..., L:]
    if not case.joint:
        latent_BSL, k_rope_BSP = latent_BSL.clone(), k_rope_BSP.clone()
    q_latent_BHL, q_rope_BHP = q_BHK[..., :L], q_BHK[..., L:]
    meant_BSL, latent_scale_BS = latent_BSL, None
    if case.stored is not None:  # NaN has no place in int8: beyond a row's length the scales carry it
        latent_BSL, latent_scale_BS = quantise(latent_BSL.nan_to_num(nan=1.0), case.stored)
        meant_BSL = latent_BSL.double() * latent_scale_BS.double().unsqueeze(-1)
        for b, length in enumerate(case.lengths):
            latent_scale_BS[b, length:] = beyond
    exact = exact_rows(q_latent_BHL, q_rope_BHP, meant_BSL, k_rope_BSP, case.lengths, scale)
    kv_BSK = kv_BSK.to(device)
    latent_BSL = kv_BSK[..., :L] if case.joint else latent_BSL.to(device)
    k_rope_BSP = kv_BSK[..., L:] if case.joint else k_rope_BSP.to(device)
    return Inputs(
        q_latent_BHL.to(device),
        q_rope_BHP.to(device) if P else None,
        latent_BSL[:, : case.slots],
        k_rope_BSP[:, : case.slots] if P else None,
        torch.tensor(case.lengths, device=device),
        scale,
        exact,
        None if latent_scale_BS is None else latent_scale_BS[:, : case.slots].to(device),
    )


def run_triton(case: Case, inputs: Inputs) -> Tensor:
    """The kernel, by its own choice or as the case wants it split and tiled."""
    if not (case.splits or case.wide):
        return latent_decode(*inputs.arguments, scale=inputs.scale, kernel="triton")
    from modeling.kernels import latent_decode_triton as kernel

    tile = kernel.plan_for(inputs.q_latent_BHL, inputs.latent_BSL).tile
    if case.wide:
        tile = next(tile for width, tile in kernel.WIDE.items() if case.rank <= width)
    return kernel.launch(*inputs.arguments, scale=inputs.scale, plan=kernel.Plan(tile, case.splits))


def error_of_triton(case: Case, device: str = "cpu") -> float:
    inputs = make_inputs(case, beyond=float("nan"), device=device)
    return inputs.error(run_triton(case, inputs))


# What the subprocess measures beside the grid; a name -> a number (an error, or 1.0 for yes).


def error_inside_a_compiled_graph() -> float:
    inputs = make_inputs(Case(4, 64, 16, SINGLE), beyond=float("nan"))
    decode = torch.compile(latent_decode, fullgraph=True, backend="eager")
    return inputs.error(decode(*inputs.arguments, scale=inputs.scale, kernel="triton"))


def nan_within_a_row_is_seen(device: str = "cpu") -> float:
    case = Case(4, 64, 16, SINGLE, slots=300, lengths=(300, 300), splits=3)
    inputs = make_inputs(case, beyond=0.0, device=device)
    inputs.latent_BSL[0, 128:256] = float("nan")  # the second range and nothing else
    out_BHL = run_triton(case, inputs)
    return float(out_BHL[0].isnan().all() and not out_BHL[1].isnan().any())


def error_with_queries_from_a_transposed_product() -> float:
    """MLA's absorbed queries are a product by heads: heads outside, rows inside; lengths may be 32-bit."""
    inputs = make_inputs(Case(5, 80, 16, SINGLE), beyond=float("nan"))
    inputs.q_latent_BHL = inputs.q_latent_BHL.transpose(0, 1).contiguous().transpose(0, 1)
    assert inputs.q_rope_BHP is not None
    inputs.q_rope_BHP = inputs.q_rope_BHP.transpose(1, 2).contiguous().transpose(1, 2)
    inputs.lengths_B = inputs.lengths_B.int()
    return inputs.error(latent_decode(*inputs.arguments, scale=inputs.scale, kernel="triton"))


def error_of_joining(device: str = "cpu") -> float:
    """The largest over numbers of ranges: partial sums of large and small weights, ranges without a slot never written."""
    from modeling.kernels.latent_decode_triton import join

    errors = []
    for splits, width in ((2, 512), (3, 80), (5, 512), (16, 272), (33, 512), (64, 512), (65, 48), (128, 512)):
        generator = torch.Generator().manual_seed(splits)
        sums_BHNL = torch.randn(2, 3, splits, width, generator=generator)
        lse_BHN = 8 * torch.randn(2, 3, splits, generator=generator)
        lse_BHN[0, :, (splits + 1) // 2 :] = float("-inf")
        weights_BHN1 = (lse_BHN.double() - lse_BHN.double().amax(-1, keepdim=True)).exp2().unsqueeze(-1)
        exact_BHL = (weights_BHN1 * sums_BHNL.double()).sum(2) / weights_BHN1.sum(2)
        sums_BHNL[0, :, (splits + 1) // 2 :] = float("nan")
        out_BHL = torch.full((2, 3, width), float("nan"), device=device)
        join(sums_BHNL.to(device), lse_BHN.to(device), out_BHL, splits)
        errors.append(float((out_BHL.double().cpu() - exact_BHL).norm() / exact_BHL.norm()))
    return float(torch.tensor(errors).max())  # NaN if one is


MEASURED: dict[str, Callable[[], float]] = {
    function.__name__: function
    for function in (
        error_inside_a_compiled_graph,
        nan_within_a_row_is_seen,
        error_with_queries_from_a_transposed_product,
        error_of_joining,
    )
}


@pytest.fixture(scope="module")
def interpreted() -> dict[str, float]:
    """Everything that the interpreter computes, measured in one subprocess."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.test_latent_decode"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@needs_triton
@pytest.mark.parametrize("case", GRID, ids=str)
def test_the_kernel_equals_float64_and_reads_nothing_beyond_a_rows_length(case: Case, interpreted: dict[str, float]) -> None:
    assert interpreted[str(case)] < TOLERANCE[case.dtype]


@needs_triton
def test_the_kernel_is_one_operator_of_a_compiled_graph(interpreted: dict[str, float]) -> None:
    assert interpreted["error_inside_a_compiled_graph"] < 1e-5


@needs_triton
def test_nan_within_a_rows_length_is_not_hidden(interpreted: dict[str, float]) -> None:
    assert interpreted["nan_within_a_row_is_seen"] == 1.0


@needs_triton
def test_any_number_of_ranges_is_joined_and_what_was_never_written_is_dropped(interpreted: dict[str, float]) -> None:
    assert interpreted["error_of_joining"] < 1e-6


@needs_triton
def test_queries_may_be_transposed_and_lengths_32_bit(interpreted: dict[str, float]) -> None:
    assert interpreted["error_with_queries_from_a_transposed_product"] < 1e-5


# --- the torch reference ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("logit_std", [1.0, 30.0])
@pytest.mark.parametrize("rope", [0, 16])
@pytest.mark.parametrize("stored", [None, torch.int8, torch.float8_e4m3fn], ids=str)
def test_the_torch_reference_equals_float64_written_out(
    stored: torch.dtype | None, rope: int, logit_std: float, dtype: torch.dtype
) -> None:
    case = Case(6, 48, rope, dtype, slots=40, lengths=(1, 40, 23, 39), logit_std=logit_std, stored=stored)
    inputs = make_inputs(case, beyond=1e3)
    out_BHL = latent_decode(*inputs.arguments, scale=inputs.scale)
    assert out_BHL.dtype == dtype and out_BHL.shape == (4, 6, 48)
    assert inputs.error(out_BHL) < TOLERANCE[dtype]


def test_logits_of_that_size_would_show_a_wrong_scale() -> None:
    inputs = make_inputs(Case(6, 48, 16, torch.float64, slots=40, lengths=(40, 23)), beyond=0.0)
    assert inputs.error(latent_decode(*inputs.arguments, scale=inputs.scale * (144 / 192) ** 0.5)) > 1e-2


def test_bfloat16_goes_through_a_softmax_in_float32() -> None:
    inputs = make_inputs(Case(6, 48, 16, torch.bfloat16, logit_std=1), beyond=0.0)
    out_BHL = latent_decode(*inputs.arguments, scale=inputs.scale)
    assert out_BHL.dtype == torch.bfloat16 and inputs.error(out_BHL) < 2e-2  # logits rounded to 8 bits


def test_the_torch_reference_compiles_without_a_graph_break() -> None:
    inputs = make_inputs(Case(6, 48, 16, torch.float64), beyond=0.0)
    decode = torch.compile(latent_decode, fullgraph=True, backend="eager")
    assert inputs.error(decode(*inputs.arguments, scale=inputs.scale)) < 1e-12


def test_the_torch_reference_copies_neither_cache() -> None:
    inputs = make_inputs(Case(2, 64, 16, torch.float32), beyond=0.0)
    assert inputs.k_rope_BSP is not None
    caches = {x.untyped_storage().data_ptr() for x in (inputs.latent_BSL, inputs.k_rope_BSP)}

    class Watch(TorchDispatchMode):
        largest_new = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in caches:
                self.largest_new = max(self.largest_new, out.numel())
            return out

    with Watch() as watch:
        latent_decode(*inputs.arguments, scale=inputs.scale)
    assert 0 < watch.largest_new < inputs.k_rope_BSP.numel()


# --- what is refused -------------------------------------------------------------------------------------------------


def test_an_unknown_kernel_is_refused_with_the_choices() -> None:
    with pytest.raises(
        ValueError, match=r"attention\.kernel=cuda is unknown; choose auto, torch, triton, gluon, flashinfer or fla"
    ):
        check_kernel("cuda", "cpu")


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, *, capability: int) -> None:
    """What the choice of a kernel asks of the machine, answered as by one with Triton and such a device."""
    for package in ("HAS_TRITON", "HAS_GLUON"):
        monkeypatch.setattr(f"modeling.kernels.availability.{package}", True)
    monkeypatch.setattr(torch.version, "hip", None)
    found = types.SimpleNamespace(major=capability, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)


def choose() -> str:
    return select_kernel("auto", device=torch.device("cuda"), dtype=torch.bfloat16, latent_width=512, qk_rope_head_dim=64)


@torch.no_grad()
def test_where_gluon_cannot_run_auto_takes_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu(monkeypatch, capability=9)
    assert choose() == "gluon"
    monkeypatch.setattr("modeling.kernels.availability.HAS_GLUON", False)
    assert choose() == "triton"
    for capability in (8, 10):
        on_a_gpu(monkeypatch, capability=capability)
        assert choose() == "triton"


@torch.no_grad()
def test_the_choice_breaks_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu(monkeypatch, capability=9)
    compiled = torch.compile(lambda x: x + len(choose()), fullgraph=True, backend="eager")
    assert compiled(torch.zeros(1)).item() == len("gluon")


@needs_triton
def test_the_triton_that_is_required_brings_gluon() -> None:
    assert HAS_GLUON and importlib.util.find_spec(OTHERS["gluon"].package) is not None


@pytest.mark.parametrize(
    ("change", "chosen"),
    [
        ({}, "gluon"),
        ({"dtype": torch.float16}, "gluon"),
        ({"dtype": torch.float32}, "triton"),
        ({"latent_width": 256}, "triton"),
        ({"qk_rope_head_dim": 0}, "triton"),
        ({"name": "torch"}, "torch"),
        ({"name": "triton"}, "triton"),
        ({"name": "triton", "device": torch.device("cpu")}, "triton"),  # which check_kernel refuses in a sentence
        ({"device": torch.device("cpu")}, "torch"),
        ({"device": torch.device("mps")}, "torch"),
        ({"dtype": torch.float64}, "torch"),
        ({"window": 16}, "torch"),
        ({"latent_width": 513}, "torch"),
        ({"qk_rope_head_dim": 66}, "torch"),
    ],
)
def test_auto_takes_the_last_kernel_of_the_table_that_can_compute_the_call(
    change: dict[str, Any], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_gpu(monkeypatch, capability=9)
    call: dict[str, Any] = {
        "name": "auto",
        "device": torch.device("cuda"),
        "dtype": torch.bfloat16,
        "latent_width": 512,
        "qk_rope_head_dim": 64,
    }
    with torch.no_grad():
        assert select_kernel(**(call | change)) == chosen
    assert select_kernel(**(call | {"name": "auto"} | change)) == (chosen if "name" in change else "torch")  # a gradient
    monkeypatch.setattr("modeling.kernels.availability.HAS_TRITON", False)
    with torch.no_grad():
        assert select_kernel(**call) == "torch"
    monkeypatch.setattr("modeling.kernels.availability.HAS_TRITON", True)
    monkeypatch.setattr(torch.version, "hip", "6.0")
    with torch.no_grad():
        assert select_kernel(**call) == "torch"


def test_torch_runs_everywhere() -> None:
    check_kernel("torch", "cpu")
    check_kernel("torch", torch.device("meta"))


def test_without_triton_the_sentence_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install -r requirements-kernels\.txt"):
        check_kernel("triton", "cuda")
    assert (ROOT / "requirements-kernels.txt").read_text().startswith("triton==")


def test_without_a_gpu_the_sentence_names_the_other_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"needs a CUDA device and this one is cpu; take attention\.kernel=torch"):
        check_kernel("triton", "cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    check_kernel("triton", "cpu")


@pytest.mark.parametrize("kernels", [OTHERS, DELTA_RULES, EXPLICIT], ids=["latents", "states", "explicit"])
def test_bfloat16_which_the_interpreter_multiplies_wrongly_is_refused(
    kernels: dict[str, Kernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    check_dtype("triton", torch.bfloat16, kernels)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    check_dtype("triton", torch.float16, kernels)
    with pytest.raises(
        ValueError, match=r"triton with TRITON_INTERPRET is wrong in torch.bfloat16: decode in float32 or float16"
    ):
        check_dtype("triton", torch.bfloat16, kernels)


@pytest.mark.parametrize(("rank", "rope"), [(576, 0), (512, 128), (0, 16)])
def test_widths_without_a_tile_are_refused(rank: int, rope: int) -> None:
    with pytest.raises(ValueError, match=f"not {rank} and {rope}; take attention.kernel=torch"):
        check_widths("triton", rank, rope)


@needs_triton
@pytest.mark.parametrize(
    ("case", "gradient", "sentence"),
    [
        (Case(4, 64, 16, torch.float64), False, "not in torch.float64; take attention.kernel=torch"),
        (Case(4, 576, 0, SINGLE), False, "kv_lora_rank up to 512"),
        (Case(4, 64, 16, SINGLE), True, "no backward pass: decode under torch.no_grad"),
    ],
    ids=["float64", "wide", "gradient"],
)
def test_the_kernel_refuses_what_it_would_get_wrong(case: Case, gradient: bool, sentence: str) -> None:
    inputs = make_inputs(case, beyond=0.0)
    inputs.q_latent_BHL.requires_grad_(gradient)
    with pytest.raises(ValueError, match=sentence):
        latent_decode(*inputs.arguments, scale=inputs.scale, kernel="triton")


# --- the choice of tile and splits -----------------------------------------------------------------------------------


@functools.cache
def kernel_module() -> Any:
    from modeling.kernels import latent_decode_triton

    return latent_decode_triton


def splits_on_h100(batch_size: int, n_heads: int, slots: int) -> int:
    kernel = kernel_module()
    tile = kernel.choose_tile(n_heads=n_heads, kv_lora_rank=512, dtype=torch.bfloat16, has_wgmma=True)
    return kernel.choose_splits(batch_size=batch_size, slots=slots, n_heads=n_heads, tile=tile, multiprocessors=132)


@needs_triton
def test_more_than_16_heads_take_the_tile_that_fills_hoppers_matrix_unit() -> None:
    choose, kernel = kernel_module().choose_tile, kernel_module()
    shape: dict[str, Any] = {"kv_lora_rank": 512, "dtype": torch.bfloat16, "has_wgmma": True}
    assert choose(n_heads=128, **shape) == choose(n_heads=17, **shape) == kernel.WIDE[512]
    assert (kernel.WIDE[512].heads, kernel.WIDE[512].slots) == (64, 64)
    assert choose(n_heads=16, **shape) == choose(n_heads=1, **shape) == kernel.NARROW[512]
    assert choose(n_heads=128, **shape | {"has_wgmma": False}) == kernel.NARROW[512]
    assert choose(n_heads=128, **shape | {"dtype": torch.float32}) == kernel.NARROW_FLOAT32[512]


@needs_triton
@pytest.mark.parametrize(("rank", "width"), [(16, 128), (80, 128), (128, 128), (144, 256), (320, 512), (512, 512)])
def test_the_tile_is_the_narrowest_that_holds_the_latent(rank: int, width: int) -> None:
    kernel = kernel_module()
    tile = kernel.choose_tile(n_heads=8, kv_lora_rank=rank, dtype=torch.float16, has_wgmma=True)
    assert tile == kernel.NARROW[width]


@needs_triton
def test_a_batch_that_fills_the_device_is_not_split_and_one_row_is_spread_over_it() -> None:
    assert splits_on_h100(batch_size=128, n_heads=128, slots=8192) == 1
    assert splits_on_h100(batch_size=1, n_heads=128, slots=8192) >= 32
    assert splits_on_h100(batch_size=32, n_heads=128, slots=8192) * 32 * 2 <= 132, "one wave, not one and a bit"


@needs_triton
def test_ranges_that_cost_more_to_join_than_they_save_are_not_made() -> None:
    """Of Gluon's kernels on an H200, with 128 heads: 36 us for 2 ranges of 512 slots at batch 32 and 43 for one of 1,024; at
    batch 1 and 8,192 slots 17.9 for 32 and 18.7 for 64; at batch 32 and as many slots 162 for 2 and 326 for 33. With 16 heads,
    at batch 32 and 8,192 slots 78.7 for 4, 79.8 for 3, 92.0 for 2 and 101 for 5.
    """
    from modeling.kernels.latent_decode_gluon_heads_triton import TILE
    from modeling.kernels.latent_decode_gluon_slots_triton import TILE as EIGHT_BITS
    from modeling.kernels.latent_decode_gluon_slots_triton import WIDE_TILE

    def splits(n_heads: int, tile: Any) -> list[int]:
        choose = functools.partial(kernel_module().choose_splits, n_heads=n_heads, tile=tile, multiprocessors=132)
        return [choose(batch_size=B, slots=S) for B in (128, 32, 1) for S in (8192, 1024)]

    assert splits(128, TILE) == [1, 1, 2, 2, 32, 8]
    assert splits(16, WIDE_TILE) == [1, 1, 4, 4, 64, 16] and splits(16, EIGHT_BITS) == [1, 1, 4, 4, 64, 8]


@needs_triton
def test_there_are_never_more_splits_than_tiles_or_than_the_most() -> None:
    kernel = kernel_module()
    for slots in (1, 31, 32, 33, 100, 1024, 10**6):
        for batch_size in (1, 7, 200):
            splits = splits_on_h100(batch_size=batch_size, n_heads=16, slots=slots)
            assert 1 <= splits <= min(kernel.MAX_SPLITS, -(-slots // kernel.NARROW[512].slots))


@needs_triton
def test_a_cache_of_one_tile_is_not_split() -> None:
    kernel = kernel_module()
    plan = kernel.plan_for(torch.empty(1, 4, 512), torch.empty(1, 16, 512))
    assert (plan.tile, plan.splits) == (kernel.NARROW_FLOAT32[512], 1)


@needs_triton
def test_a_longer_cache_of_the_same_batch_never_takes_fewer_splits() -> None:
    splits = [splits_on_h100(batch_size=4, n_heads=16, slots=2**n) for n in range(5, 17)]
    assert splits == sorted(splits)


# --- the benchmark ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("heads=16", "needs a CUDA device"),
        ("heads=16,", "heads=16, must be positive whole numbers"),
        ("kernels=triton,flash", "kernels=flash is unknown"),
        ("tile=16,32", "five numbers"),
    ],
)
def test_the_benchmark_says_in_one_sentence_why_it_cannot_run(argument: str, sentence: str, forks: Forks) -> None:
    done = forks.run("benchmarks/latent_decode.py", argument, environment={"CUDA_VISIBLE_DEVICES": ""})
    assert done.status == 2 and sentence in done.errors and done.errors.count("\n") == 1


@needs_triton
@pytest.mark.slow
def test_every_tile_compiles_for_hopper_without_spilling_and_as_many_fit_as_the_table_says() -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/latent_decode.py", "--offline"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {"CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    header, *lines = done.stdout.splitlines()[1:]
    assert header.split()[-9:-4] == ["spilt", "B", "KiB", "resident", "table"], "columns moved"
    joining = [line for line in lines if "joining" in line]
    assert len(joining) == 6 and all(line.split()[6] == "0" for line in joining), joining
    for line in lines[:-14]:  # then the joining kernel, and those in Gluon
        widths, dtype, tile = line.split()[1:4]
        spilt, _, resident, table, wgmma = line.split()[-8:-3]
        assert int(spilt) < 100 and int(resident) >= int(table), line
        assert (int(wgmma) > 0) == tile.startswith("64x"), line
        in_words = dtype in ("int8", "fp8")  # whose queries are taken apart before the loop: that alone spills
        assert widths != "512+64" or in_words or int(spilt) == 0, line
    for i, line in enumerate(lines[-6:]):  # slots by heads: bfloat16, int8 and fp8, with one range and more
        spilt, shared, resident, table, wgmma, _, _, ldmatrix = line.split()[-8:]
        assert "gluon" in line and int(spilt) <= 64 and float(shared) <= 227 and resident == table == "1", line
        assert int(wgmma) == (1 if i < 2 else 2) * (4 + 32 + 32), line
        assert int(ldmatrix) == 2 * (0, 16, 32)[i // 2], line
    for line in lines[-8:-6]:
        spilt, shared, resident, table, wgmma = line.split()[-8:-3]
        # What it spills are the descriptors of operands, before a loop.
        assert "gluon" in line and int(spilt) < 300 and float(shared) <= 227 and resident == table == "1", line
        assert int(wgmma) == 2 * (36 + 8), line


# --- on a GPU --------------------------------------------------------------------------------------------------------

GPU_GRID = tuple(
    dict.fromkeys(
        replace(case, dtype=dtype, wide=case.wide and dtype != SINGLE)
        for case in (
            *GRID,
            Case(16, 512, 64, HALF, slots=1000, lengths=(1000, 1, 999, 64)),
            Case(128, 512, 64, HALF, slots=1000, lengths=(1000, 1, 999, 64)),
            Case(128, 512, 64, HALF, slots=1000, lengths=(1000, 1, 999, 64), splits=1, logit_std=1),
            Case(64, 256, 32, HALF, slots=500, lengths=(500, 2)),
            Case(16, 512, 64, HALF, slots=1000, lengths=(1000, 1, 999, 64), stored=torch.int8, logit_std=1),
            Case(16, 512, 64, HALF, slots=1000, lengths=(1000, 1, 999, 64), stored=torch.float8_e4m3fn),
            Case(128, 512, 64, HALF, slots=1000, lengths=(1000, 1, 999, 64), stored=torch.int8),
        )
        for dtype in (torch.bfloat16, HALF, SINGLE)
    )
)


def on_hopper() -> bool:
    return torch.cuda.get_device_capability()[0] == 9


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_GRID, ids=str)
def test_the_compiled_kernel_equals_float64_and_reads_nothing_beyond_a_rows_length(case: Case) -> None:
    if case.wide and not on_hopper():
        pytest.skip("the wide tile is for Hopper's matrix unit and its shared memory")
    assert error_of_triton(case, "cuda") < TOLERANCE[case.dtype]


@pytest.mark.gpu
def test_any_number_of_ranges_is_joined_on_a_gpu() -> None:
    assert error_of_joining("cuda") < 1e-6


@pytest.mark.gpu
def test_nan_within_a_rows_length_is_not_hidden_on_a_gpu() -> None:
    assert nan_within_a_row_is_seen("cuda") == 1.0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, HALF, SINGLE], ids=str)
def test_the_torch_reference_keeps_large_half_precision_logits_exact_on_a_gpu(dtype: torch.dtype) -> None:
    inputs = make_inputs(Case(16, 512, 64, dtype, slots=300, lengths=(300, 1)), beyond=0.0, device="cuda")
    for decode in (latent_decode, torch.compile(latent_decode, fullgraph=True)):
        assert inputs.error(decode(*inputs.arguments, scale=inputs.scale)) < TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [16, 128])
def test_results_repeat_bit_for_bit(heads: int) -> None:
    lengths = tuple(range(900, 1001, 10))
    inputs = make_inputs(Case(heads, 512, 64, torch.bfloat16, slots=1000, lengths=lengths), beyond=float("nan"), device="cuda")
    first = latent_decode(*inputs.arguments, scale=inputs.scale, kernel="triton")
    for _ in range(50):
        again = latent_decode(*inputs.arguments, scale=inputs.scale, kernel="triton")
        assert torch.equal(first, again)


@pytest.mark.gpu
def test_a_captured_launch_follows_lengths_that_change_on_the_device() -> None:
    case = Case(16, 512, 64, torch.bfloat16, slots=1000, lengths=(1000, 700))
    inputs = make_inputs(case, beyond=float("nan"), device="cuda")
    latent_decode(*inputs.arguments, scale=inputs.scale, kernel="triton")  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out_BHL = latent_decode(*inputs.arguments, scale=inputs.scale, kernel="triton")
    graph.replay()
    assert inputs.error(out_BHL) < TOLERANCE[torch.bfloat16]
    inputs.lengths_B.copy_(torch.tensor((10, 333)))
    inputs.exact_BHL = exact_rows(*(None if x is None else x.cpu() for x in inputs.arguments[:4]), (10, 333), inputs.scale)
    graph.replay()
    assert inputs.error(out_BHL) < TOLERANCE[torch.bfloat16]


@pytest.mark.gpu
def test_the_compiled_kernel_is_one_operator_of_a_compiled_graph() -> None:
    inputs = make_inputs(Case(16, 512, 64, torch.bfloat16), beyond=float("nan"), device="cuda")
    decode = torch.compile(latent_decode, fullgraph=True)
    assert inputs.error(decode(*inputs.arguments, scale=inputs.scale, kernel="triton")) < TOLERANCE[torch.bfloat16]


@pytest.mark.gpu
def test_every_kernel_that_is_installed_may_run_here() -> None:
    major, _ = torch.cuda.get_device_capability()
    for name in KERNELS:
        kernel = (OTHERS | DELTA_RULES).get(name)
        if kernel is None or (importlib.util.find_spec(kernel.package) and kernel.capability in (None, major)):
            check_kernel(name, "cuda")


if __name__ == "__main__":
    torch.set_num_threads(2)
    results = {str(case): error_of_triton(case) for case in GRID}
    results |= {name: function() for name, function in MEASURED.items()}
    print(json.dumps(results))
