"""The decode kernel of explicit keys and values against `attend`'s reference in float64, and in whole models against torch's.

Without a GPU it runs in Triton's interpreter, in one subprocess (this file as a program), as that of test_latent_decode.py
does, and for its reason not in bfloat16.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import modeling.attention.output
from harness.errors import UserError
from harness.runs.load import decode_path, pin_execution
from modeling.attention import execute
from modeling.attention.contract import randomise
from modeling.attention.quantisation import cache_format
from modeling.attention.rope import RotaryEmbedding, rotate_last
from modeling.generation import generate
from modeling.kernels.attend import attend
from modeling.kernels.attend_decode import attend_decode
from modeling.kernels.decode_kernels import select_explicit
from tests.kernels.test_latent_decode import TOLERANCE, needs_triton, on_a_gpu
from tests.support.variants import gpt_from

ROOT = Path(__file__).resolve().parents[2]
HALF, SINGLE, SCALE = torch.float16, torch.float32, 0.07


@dataclass(frozen=True)
class Case:
    """A shape. keys: what they are made of (attend_decode_triton.py); P: width that is shared, or turned; the rest as there."""

    heads: int
    groups: int
    K: int
    V: int
    dtype: torch.dtype = SINGLE
    keys: str = "own"
    P: int = 0
    sinks: bool = False
    slots: int = 70
    lengths: tuple[int, ...] = (70, 1, 33)
    splits: int = 0
    wide: bool = False
    logit_std: float = 30.0
    joint: bool = False  # keys and values of a token side by side in one buffer
    tables: int = 1  # rows of angles: one for all, or one each

    def __str__(self) -> str:
        name = (
            f"h{self.heads}-{self.groups}-{self.K}-{self.V}-{self.keys}{self.P or ''}-{str(self.dtype).removeprefix('torch.')}"
        )
        name += f"-s{self.slots}-split{self.splits or ''}" + "-sinks" * self.sinks + "-wide" * self.wide + "-joint" * self.joint
        return name + f"-{self.tables}" * (self.tables > 1) + (f"-std{self.logit_std:g}" if self.logit_std != 30 else "")


GRID = (
    Case(1, 1, 16, 16),
    Case(4, 4, 64, 64, HALF, splits=1),
    Case(4, 4, 64, 32, joint=True, splits=2),
    Case(8, 2, 64, 64, HALF, sinks=True, logit_std=1),
    Case(8, 2, 48, 80, sinks=True, slots=300, lengths=(300, 1, 129), splits=5),
    Case(6, 1, 40, 24, HALF, splits=3, logit_std=1),
    Case(6, 3, 256, 256, slots=50, lengths=(50, 18)),
    Case(40, 2, 64, 128, slots=140, lengths=(140, 3), splits=2),
    Case(40, 2, 64, 64, HALF, wide=True, sinks=True, splits=2, slots=140, lengths=(140, 3)),
    Case(64, 1, 32, 32, lengths=(70, 64)),
    Case(100, 1, 32, 32, wide=True, lengths=(9,)),
    Case(4, 4, 96, 64, keys="own", P=32),
    Case(4, 2, 48, 40, HALF, keys="own", P=24, splits=2, sinks=True, logit_std=1),
    Case(8, 2, 64, 64, keys="tied", P=32, splits=2),
    Case(8, 2, 48, 48, HALF, keys="tied", P=8),
    Case(4, 2, 64, 64, keys="tied"),
    Case(8, 2, 64, 64, keys="turned", P=64, splits=2),
    Case(8, 2, 64, 64, HALF, keys="turned", P=64, splits=1, logit_std=1),
    Case(6, 2, 48, 48, keys="turned", P=16, tables=3),
    Case(6, 2, 80, 80, HALF, keys="turned", P=80, sinks=True, logit_std=1),
    Case(40, 2, 32, 32, keys="turned", P=16),
)


@dataclass
class Inputs:
    q_BHK: Tensor
    k_BSGK: Tensor
    v_BSGV: Tensor
    lengths_B: Tensor
    options: dict[str, Any]
    exact_BHV: Tensor

    def error(self, out_BHV: Tensor) -> float:
        """||out - exact|| / ||exact||; nan if anything is nan."""
        return float((out_BHV.double().cpu() - self.exact_BHV).norm() / self.exact_BHV.norm())


def exact(q_BHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, lengths: tuple[int, ...], options: dict[str, Any]) -> Tensor:
    """The reference backend in float64, row by row over its own slots alone."""
    rows = []
    for b, length in enumerate(lengths):
        q, k, v = (x[b : b + 1].double() for x in (q_BHK.unsqueeze(1), k_BSGK[:, :length], v_BSGV[:, :length]))
        if (turned := options.get("turned")) is not None:
            gain_K, *tables = (each.double() for each in turned)
            cos, sin = (each[b % len(each) :][:1, :length] for each in tables)
            k = rotate_last(k, (cos, sin), gain_K)
        k_rope, sinks = options.get("k_rope_BSP"), options.get("sinks_H")
        out, _ = attend(
            q,
            k,
            v,
            scale=SCALE,
            k_rope_BSP=None if k_rope is None else k_rope[b : b + 1, :length].double(),
            sink_logits_H=None if sinks is None else sinks.double(),
            backend="reference",
        )
        rows.append(out[0, 0])
    return torch.stack(rows)


def make_inputs(case: Case, *, beyond: float = float("nan"), device: str = "cpu") -> Inputs:
    """Random tensors with `beyond` in every slot past a row's length; the caches are views into longer buffers."""
    generator = torch.Generator().manual_seed(0)
    B, H, G, K, V, P = len(case.lengths), case.heads, case.groups, case.K, case.V, case.P

    def normal(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    def cached(*shape: int) -> Tensor:
        entries = normal(B, case.slots + 3, *shape)
        for b, length in enumerate(case.lengths):
            entries[b, length:] = beyond
        return entries

    q_BHK = (normal(B, H, K, dtype=torch.float64) * case.logit_std / (SCALE * K**0.5)).to(case.dtype)
    own = K - (P if case.keys == "own" else 0)
    kv = cached(G, own + V).to(device)
    k_BSGK, v_BSGV = kv.split((own, V), dim=-1) if case.joint else (kv[..., :own].clone(), kv[..., own:].clone())
    v_BSGV = v_BSGV[:, : case.slots]
    k_BSGK = k_BSGK[:, : case.slots] if case.keys == "own" else v_BSGV
    options: dict[str, Any] = {}
    if case.sinks:
        options["sinks_H"] = (normal(H, dtype=SINGLE) * case.logit_std).to(device)
    if P and case.keys == "turned":
        rope = RotaryEmbedding(width=P, max_seq_len=200, theta=100.0)
        positions_BS = torch.randint(200, (case.tables, case.slots), generator=generator)
        tables = [each.to(device) for each in rope.tables(0, case.slots, positions_BS)]
        options["turned"] = (normal(K, dtype=SINGLE).to(device), *tables)
    elif P:
        options["k_rope_BSP"] = cached(P)[:, : case.slots].to(device)
    inputs = Inputs(q_BHK.to(device), k_BSGK, v_BSGV, torch.tensor(case.lengths, device=device), options, torch.empty(0))
    inputs.exact_BHV = exact(inputs.q_BHK, k_BSGK, v_BSGV, case.lengths, options).cpu()
    return inputs


def run(case: Case, inputs: Inputs) -> Tensor:
    """The kernel, by its own choice or as the case wants it split and tiled."""
    arguments = inputs.q_BHK, inputs.k_BSGK, inputs.v_BSGV, inputs.lengths_B
    decode = functools.partial(attend_decode, *arguments, scale=SCALE, kernel="triton", **inputs.options)
    if case.splits or case.wide:
        from modeling.kernels import attend_decode_triton as kernel

        turned = case.keys == "turned"
        plan = kernel.plan_for(inputs.q_BHK, inputs.v_BSGV, turned=turned)
        if case.wide:
            widths = {"n_heads": case.heads // case.groups, "K": case.K, "V": case.V}
            plan = replace(plan, tile=kernel.choose_tile(**widths, dtype=HALF, turned=turned))
            assert plan.tile.heads == 64
        if case.splits:
            plan = replace(plan, splits=case.splits)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernel, "decode", functools.partial(kernel.decode, plan=plan))
            return decode()
    return decode()


def error_of(case: Case, device: str = "cpu") -> float:
    inputs = make_inputs(case, device=device)
    return inputs.error(run(case, inputs))


def error_inside_a_compiled_graph(device: str = "cpu", backend: str = "eager") -> float:
    inputs = make_inputs(Case(4, 2, 64, 64, keys="turned", P=64), device=device)
    decode = torch.compile(attend_decode, fullgraph=True, backend=backend)
    arguments = inputs.q_BHK, inputs.k_BSGK, inputs.v_BSGV, inputs.lengths_B
    return inputs.error(decode(*arguments, scale=SCALE, kernel="triton", **inputs.options))


def nan_within_a_row_is_seen(device: str = "cpu") -> float:
    case = Case(4, 2, 64, 64, slots=300, lengths=(300, 300), splits=3)
    inputs = make_inputs(case, beyond=0.0, device=device)
    inputs.v_BSGV[0, 128:256] = float("nan")  # the second range and nothing else
    out_BHV = run(case, inputs)
    return float(out_BHV[0].isnan().all() and not out_BHV[1].isnan().any())


def error_with_queries_and_keys_from_transposed_products() -> float:
    """Heads outside and rows inside; a last dimension that is not contiguous; lengths of 32 bits beyond the slots (a ring)."""
    case = Case(6, 3, 48, 32, lengths=(70, 70, 33))
    inputs = make_inputs(case)
    inputs.q_BHK = inputs.q_BHK.transpose(0, 1).contiguous().transpose(0, 1)
    inputs.k_BSGK = inputs.k_BSGK.transpose(1, 3).contiguous().transpose(1, 3)
    inputs.v_BSGV = inputs.v_BSGV.transpose(1, 2).contiguous().transpose(1, 2)
    inputs.lengths_B = torch.tensor((70, 1000, 33), dtype=torch.int32)
    return inputs.error(run(case, inputs))


MEASURED: dict[str, Callable[[], float]] = {
    function.__name__: function
    for function in (
        error_inside_a_compiled_graph,
        nan_within_a_row_is_seen,
        error_with_queries_and_keys_from_transposed_products,
    )
}

# In whole models: overrides, and what the cache holds.
MODELS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "mha": (["attention=mha"], {}),
    "gqa, int8": (["attention=gqa"], {"cache_dtype": torch.int8}),
    "gqa, keys by channel": (["attention=gqa"], {"cache_dtype": cache_format("kc4v4")}),
    "gta": (["attention=gta"], {}),
    "gta, normed keys": (["attention=gta", "attention.qk_norm=true"], {"window": 5, "sinks": 1}),
    "tied_kv": (["attention=tied_kv"], {}),
    "tied_kv, turned in part, in a window": (["attention=tied_kv", "attention.qk_rope_head_dim=6"], {"window": 5, "sinks": 1}),
    "shared_kv": (["attention=shared_kv"], {}),
    "windows and sinks": (["attention=swa_sinks", "attention.kinds.local.window=4"], {}),
    "mha_decoupled": (["attention=mha_decoupled"], {}),
    "gqa_cla": (["attention=gqa_cla"], {}),
}
PROMPTS = [[5, 17, 3], [60, 61, 62, 63, 64, 65, 66], [9]]


def texts() -> dict[str, list[bool]]:
    """For each model, whether rows of unequal length, and one alone, write with triton what they write with torch, and whether
    the kernel was called in each of two layers for every new token.
    """
    calls: list[str] = []

    def decode(*arguments: Any, kernel: str, **options: Any) -> Tensor:
        calls.append(kernel)
        return attend_decode(*arguments, kernel=kernel, **options)

    modeling.attention.output.attend_decode = decode
    same = {}
    for name, (overrides, options) in MODELS.items():
        model = randomise(gpt_from(overrides, n_layers=2)).eval()
        written = []
        for kernel in ("torch", "triton"):
            model.set_execution(kernel=kernel)
            calls.clear()
            for prompts in (PROMPTS, [PROMPTS[1]]):  # a mask, and rows of one length
                tokens = generate(model, prompts, max_new_tokens=4, temperature=0, stop=99, **options)
                written.append(torch.stack(list(tokens)).tolist())
        steps = sum(len(tokens) - 1 for tokens in written[2:])
        same[name] = [written[:2] == written[2:], steps > 2 and calls == ["triton"] * (2 * steps)]
    return same


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    """Everything that the interpreter computes, measured in one subprocess."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.test_attend_decode"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@needs_triton
@pytest.mark.parametrize("case", GRID, ids=str)
def test_the_kernel_equals_the_reference_and_reads_nothing_beyond_a_rows_length(
    case: Case, interpreted: dict[str, Any]
) -> None:
    assert interpreted[str(case)] < TOLERANCE[case.dtype]


@needs_triton
def test_the_kernel_is_one_operator_of_a_compiled_graph(interpreted: dict[str, Any]) -> None:
    assert interpreted["error_inside_a_compiled_graph"] < 1e-5


@needs_triton
def test_nan_within_a_rows_length_is_not_hidden(interpreted: dict[str, Any]) -> None:
    assert interpreted["nan_within_a_row_is_seen"] == 1.0


@needs_triton
def test_strides_may_be_any_and_lengths_32_bit_and_beyond_a_ring(interpreted: dict[str, Any]) -> None:
    assert interpreted["error_with_queries_and_keys_from_transposed_products"] < 1e-5


@needs_triton
@pytest.mark.parametrize("model", MODELS)
def test_a_model_writes_with_the_kernel_what_it_writes_with_torch(model: str, interpreted: dict[str, Any]) -> None:
    assert interpreted["texts"][model] == [True, True]


# --- the choice, what is said of it and what is refused ---------------------------------------------------------------


def choose(name: str = "auto", **changes: Any) -> str:
    call: dict[str, Any] = {"device": torch.device("cuda"), "dtype": torch.bfloat16, "K": 64, "V": 64}
    return select_explicit(name, **(call | changes))


@torch.no_grad()
def test_auto_takes_the_kernel_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu(monkeypatch, capability=9)
    assert choose() == "triton" and choose("triton") == "triton" and choose("torch") == "torch"
    assert {choose(device=torch.device("cpu")), choose(dtype=torch.float64), choose(K=320), choose(V=257)} == {"torch"}
    with torch.enable_grad():
        assert choose() == "torch"
    attention = gpt_from(["attention=gqa"], n_layers=1).attentions[0]
    asked = functools.partial(modeling.attention.output.decode_kernel, attention, torch.bfloat16, torch.device("cuda"))
    assert asked() == "triton"
    execute([attention], backend="reference")
    assert asked() == "torch", "the reference is asked for to be compared with"


@torch.inference_mode()
@pytest.mark.parametrize("variant", ["gqa", "tied_kv", "swa_sinks", "gqa_cla"])
def test_the_path_that_is_said_is_the_path_that_ran(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def stand_in(q_BHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, *others: Any, kernel: str, **options: Any) -> Tensor:
        ran.append(kernel)
        return q_BHK.new_zeros(*q_BHK.shape[:2], v_BSGV.shape[-1])

    monkeypatch.setattr("modeling.attention.output.attend_decode", stand_in)
    model = gpt_from([f"attention={variant}"], n_layers=2).eval()
    cache = model.new_cache(1, 8, dtype=torch.float32, device="cpu")
    for kernel, new_tokens, by in (("triton", 2, 0), ("triton", 1, 2), ("torch", 1, 0), ("auto", 1, 0)):
        model.set_execution(kernel=kernel)
        ran.clear()
        model(torch.zeros(1, new_tokens, dtype=torch.long), cache)
        assert ran == ["triton"] * by
        assert ("(triton kernel)" in decode_path(model, new_tokens)) == bool(by)
    model.set_execution(kernel="triton")
    assert decode_path(model).endswith("cached (triton kernel for one new token, torch for more)") or variant == "tied_kv"
    ran.clear()
    model(torch.zeros(1, 1, dtype=torch.long))  # no cache: a sequence of one token
    assert ran == []


def test_what_the_kernel_cannot_is_refused_in_a_sentence() -> None:
    wide = ["attention=mha", "attention.head_dim=272", "attention.v_head_dim=16"]
    sentence = "takes keys and values up to 256 wide, and this variant's are 272 and 16: use attention.kernel=torch"
    with pytest.raises(ValueError, match=f"^attention.kernel=triton {sentence}$"):
        gpt_from(wide).set_execution(kernel="triton")
    model = gpt_from(["attention=swa_sinks", "attention.kinds.local.window=6"], n_layers=2).eval()
    model.set_execution(kernel="triton")
    model.new_cache(1, 16, dtype=torch.float32, device="cpu", window=6, sinks=2)
    with pytest.raises(ValueError, match=r"sinks=2 further back than the layer's own window of 6 take attention.kernel=torch"):
        model.new_cache(1, 16, dtype=torch.float32, device="cpu", window=5, sinks=2)


@pytest.mark.parametrize(
    ("dtype", "gradient", "sentence"),
    [
        (torch.float64, False, "not in torch.float64; take attention.kernel=torch"),
        (SINGLE, True, "no backward pass: decode under torch.no_grad"),
    ],
    ids=["float64", "gradient"],
)
def test_the_kernel_refuses_what_it_would_get_wrong(dtype: torch.dtype, gradient: bool, sentence: str) -> None:
    inputs = make_inputs(Case(4, 2, 16, 16, dtype))
    inputs.q_BHK.requires_grad_(gradient)
    with pytest.raises(ValueError, match=sentence):
        run(Case(4, 2, 16, 16, dtype), inputs)


def test_a_dtype_that_the_kernel_lacks_is_refused_before_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.runs.load.check_kernel", lambda name, device: None)
    execution = {"backend": "sdpa", "decode": "auto", "kernel": "triton"}
    for name in ("gqa", "tied_kv"):
        model = gpt_from([f"attention={name}"], n_layers=1)
        pin_execution(model, execution, device=torch.device("cpu"), precision=torch.float32)
        with pytest.raises(UserError, match=r"not in torch.float64; take attention.kernel=torch"):
            pin_execution(model, execution, device=torch.device("cpu"), precision=torch.float64)


@needs_triton
def test_few_rows_are_spread_over_the_device_and_many_are_not_split() -> None:
    from modeling.kernels.attend_decode_triton import choose_tile
    from modeling.kernels.latent_decode_triton import choose_splits

    def splits(batch_size: int, slots: int, n_kv_heads: int) -> int:
        tile = choose_tile(n_heads=8 // n_kv_heads, K=64, V=64, dtype=torch.bfloat16)
        rows = batch_size * n_kv_heads
        return choose_splits(batch_size=rows, slots=slots, n_heads=8 // n_kv_heads, tile=tile, multiprocessors=132)

    assert splits(256, 8192, 8) == 1 and splits(1, 8192, 2) >= 32 and splits(1, 1024, 8) == 8
    assert splits(32, 8192, 2) * 64 <= 4 * 132, "one wave, not one and a bit"


# --- on a GPU --------------------------------------------------------------------------------------------------------

GPU_GRID = tuple(
    dict.fromkeys(
        replace(case, dtype=dtype, wide=case.wide and dtype != SINGLE)
        for case in (
            *GRID,
            Case(8, 8, 64, 64, slots=1000, lengths=(1000, 1, 999, 64)),
            Case(8, 2, 128, 128, slots=1000, lengths=(1000, 1, 999, 64), sinks=True),
            Case(64, 2, 256, 256, slots=500, lengths=(500, 2)),
            Case(64, 1, 128, 128, slots=500, lengths=(500, 2), keys="turned", P=128),
            Case(64, 1, 256, 256, slots=500, lengths=(500, 2), keys="turned", P=256),
            Case(16, 4, 128, 128, slots=500, lengths=(500, 2), keys="tied", P=64),
        )
        for dtype in (torch.bfloat16, HALF, SINGLE)
    )
)


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_GRID, ids=str)
def test_the_compiled_kernel_equals_the_reference_and_reads_nothing_beyond_a_rows_length(case: Case) -> None:
    if case.wide and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the wide tile is for Hopper's matrix unit and its shared memory")
    # Keys that are turned are rounded once more, as torch's are: at large logits that is an error of the weights.
    small = replace(case, logit_std=1.0) if case.keys == "turned" and case.dtype != SINGLE else case
    assert error_of(small, "cuda") < TOLERANCE[case.dtype]


@pytest.mark.gpu
def test_nan_within_a_rows_length_is_not_hidden_on_a_gpu() -> None:
    assert nan_within_a_row_is_seen("cuda") == 1.0


@pytest.mark.gpu
def test_the_compiled_kernel_is_one_operator_of_a_compiled_graph() -> None:
    assert error_inside_a_compiled_graph("cuda", "inductor") < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("keys", ["own", "turned"])
def test_results_repeat_bit_for_bit(keys: str) -> None:
    P = 64 if keys == "turned" else 0
    case = Case(8, 2, 64, 64, torch.bfloat16, keys=keys, P=P, slots=1000, lengths=tuple(range(900, 1001, 10)))
    inputs = make_inputs(case, device="cuda")
    first = run(case, inputs)
    for _ in range(50):
        assert torch.equal(first, run(case, inputs))


@pytest.mark.gpu
@torch.inference_mode()
@pytest.mark.parametrize("model", MODELS)
def test_a_captured_and_a_compiled_step_write_what_an_eager_one_writes(model: str) -> None:
    overrides, options = MODELS[model]
    gpt = randomise(gpt_from(overrides, n_layers=2)).eval().to("cuda")

    def written(kernel: str, step: str) -> list[list[int]]:
        gpt.set_execution(kernel=kernel)
        tokens = generate(gpt, PROMPTS, max_new_tokens=12, temperature=0, step=step, **options)
        return torch.stack(list(tokens)).tolist()

    assert written("triton", "eager") == written("triton", "graph") == written("torch", "eager")
    assert len(written("triton", "compile")) == 12


if __name__ == "__main__":
    torch.set_num_threads(2)
    results: dict[str, Any] = {str(case): error_of(case) for case in GRID}
    results |= {name: function() for name, function in MEASURED.items()}
    print(json.dumps(results | {"texts": texts()}))
