"""What decoding costs: the figures, their turns, and the command from end to end. Nothing about speed."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.config.run_config import save_run_config
from harness.decode import speed
from harness.decode.speed import Clock, DecodeTime, Spread, measure, measure_cell
from harness.decode.subjects import plan_cells, weight_bytes
from harness.errors import UserError
from harness.report.decode_speed import cache_lines, compared, crossings
from harness.report.document import in_ms
from modeling.attention.cache import Cache, Placement
from scripts import benchmark_decode
from tests.support.decoding import plan, subject
from tests.support.micro import records
from tests.support.variants import config_at

MICRO = [
    "model.d_model=32",
    "model.n_layers=2",
    "model.n_heads=2",
    "model.head_dim=16",
    "model.mlp_hidden=64",
    "vocab_size=100",
    "device=cpu",
    "rounds=2",
    "steps=3",
    "memory_budget_gib=0.5",
]


@pytest.fixture(autouse=True)
def as_many_steps_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the machine is meanwhile."""
    monkeypatch.setattr(speed, "READING_SECONDS", 1e9)


# --- arithmetic ------------------------------------------------------------------------------------------------------


def test_figures_hold_the_bytes_and_rates_that_follow_from_their_sizes() -> None:
    variants = [subject("mha"), subject("mla")]
    p = plan(contexts=(16, 40))
    results = measure(plan_cells(variants, p), p)
    assert [(f.row, f.context) for f in results.figures] == [
        (row, context) for context in (16, 40) for row in ("mha", "mla expand", "mla absorbed")
    ]
    assert results.bandwidth > 0 and not results.skipped
    for f in results.figures:
        width = 4 * 2 * (2 * 4 * 12 if f.variant == "mha" else 24 + 6)  # float32, two layers
        of_variant = variants[f.variant == "mla"]
        assert (f.cache_bytes_per_token, f.cache_bytes) == (width, 2 * f.context * width)
        assert f.step_bytes == weight_bytes(of_variant.part) + 2 * (f.context + 1) * width
        assert f.tokens_per_second == pytest.approx(2 / f.call.median)
        assert f.bytes_per_second == pytest.approx(f.step_bytes / f.call.median)
        assert f.of_bandwidth == pytest.approx(f.bytes_per_second / results.bandwidth)
        assert f.largest_batch == (2**28 - of_variant.whole.parameter_bytes) // (width * f.context)
        assert f.call.n == p.rounds * p.steps and f.call.low <= f.call.median <= f.call.high
        assert (f.first_token is None) == (2 * f.context > p.prefill_tokens)


def test_a_spread_is_the_median_with_the_quartiles() -> None:
    assert Spread.of([5.0, 1.0, 3.0, 2.0, 4.0]) == Spread(3.0, 2.0, 4.0, 5)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0, 1)


def test_a_clock_gives_the_time_before_each_mark() -> None:
    clock = Clock(torch.device("cpu"))
    for _ in range(3):
        clock.mark()
    assert len(clock.seconds()) == 3 and all(seconds >= 0 for seconds in clock.seconds())


@pytest.mark.parametrize(
    ("seconds", "shown"), [(2.5, "2,500"), (0.1234, "123"), (0.01234, "12.3"), (1.234e-3, "1.23"), (1.2e-5, "0.0120")]
)
def test_milliseconds_have_three_figures(seconds: float, shown: str) -> None:
    assert in_ms(1e3 * seconds) == shown


# --- crossovers ------------------------------------------------------------------------------------------------------


def test_power_laws_cross_where_they_are_equal() -> None:
    points = [(x, x / 300) for x in (16, 64, 256, 1024)]  # equal at 300
    assert crossings(points) == [pytest.approx(300)]
    assert crossings([(x, 1 / ratio) for x, ratio in points]) == [pytest.approx(300)]
    assert crossings(points[:3]) == []


@pytest.mark.parametrize(
    ("ratios", "sentence"),
    [
        ([0.25, 0.5, 4.0], "absorbed is faster up to about 17 tokens, expand above"),
        ([2.0, 0.5, 0.1], "expand is faster up to about 5 tokens, absorbed above"),
        ([0.9, 0.8, 0.7], "absorbed is faster at all that was measured, 2 to 32 tokens"),
        ([1.5], "expand is faster at all that was measured, 2 tokens"),
        ([2.0, 0.5, 2.0], "not settled: the paths change places at about 5, 20 tokens"),
    ],
)
def test_a_crossover_in_words(ratios: list[float], sentence: str) -> None:
    assert compared(list(zip((2, 12, 32)[: len(ratios)], ratios, strict=True)), "tokens") == sentence


# --- readings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layers", "seen"), [(0, {16, 17, 18}), (2, {16})])  # one cache for three steps, or one for each
def test_every_reading_starts_at_the_context(layers: int, seen: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are taken back, those of one token and those of several: more of them are timed than a cache has room for."""
    lengths: list[int] = []
    mla = subject("mla", layers=layers)
    place = Cache.place

    def noted(self: Cache, new_tokens: int, valid_BT: torch.Tensor | None) -> Placement:
        lengths.append(int(self.lengths_B.max()))
        return place(self, new_tokens, valid_BT)

    monkeypatch.setattr(Cache, "place", noted)
    p = plan(queries=(1, 5), rounds=7, prefill_tokens=0)
    results = measure(plan_cells([mla], p), p)
    assert {(f.path, f.queries, f.call.n) for f in results.figures} == {
        (path, queries, 21) for path in ("expand", "absorbed") for queries in (1, 5)
    }
    assert set(lengths) == seen


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, 1), (1e9, 7)])
def test_a_cell_whose_time_is_over_has_been_read_equally_often_for_all(seconds: float, rounds: int) -> None:
    p = plan(rounds=7, prefill_tokens=0)
    (cell,) = plan_cells([subject("mha"), subject("mla"), subject("gqa")], p)
    figures, _ = measure_cell(cell, p, seconds=seconds)
    assert [(f.row, f.call.n) for f in figures] == [
        (row, rounds * p.steps) for row in ("mha", "mla expand", "mla absorbed", "gqa")
    ]


# --- the command -----------------------------------------------------------------------------------------------------


def measured(capsys: pytest.CaptureFixture[str], out: Path, *options: str) -> tuple[str, dict[str, Any]]:
    capsys.readouterr()
    assert benchmark_decode.main([*MICRO, f"out={out}", *options]) == 0
    said = capsys.readouterr().out
    (record,) = records(said)
    return said, record


def test_several_kernels_are_a_row_each_of_the_variants_that_have_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def stand_in(q_BHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, *others: Any, kernel: str, **options: Any) -> Tensor:
        calls.append(kernel)
        return q_BHK.new_zeros(*q_BHK.shape[:2], v_BSGV.shape[-1])

    for place in ("harness.runs.load", "modeling.kernels.decode_kernels"):
        monkeypatch.setattr(f"{place}.check_kernel", lambda name, device: None)
    monkeypatch.setattr("modeling.attention.output.attend_decode", stand_in)
    options = ("attention=gqa,tpa,tied_kv", "kernel=torch,fla,triton", "contexts=8", "batch_sizes=1", "prefill_tokens=0")
    _, record = measured(capsys, tmp_path, *options, "level=attention")
    rows = ["gqa, torch", "gqa, triton", "tpa, torch expand", "tpa, torch absorbed", "tied_kv, torch", "tied_kv, triton"]
    assert [figure["row"] for figure in record["figures"]] == rows
    assert calls == ["triton"] * (2 * (3 + 2 * 3)), "to warm up, and two readings of three steps"
    said = "one new token over keys and values is computed by triton"
    by, fla, tpa = "one new token absorbed is computed by torch", "no row of gqa, fla; ", "no row of tpa, triton: "
    assert [note for note in record["notes"] if not note.startswith("no row")] == [
        f"gqa, triton: {said}",
        f"tpa, torch: {by}",
        f"tied_kv, triton: {said}",
    ]
    assert any(note.startswith(fla) for note in record["notes"]) and any(note.startswith(tpa) for note in record["notes"])
    with pytest.raises(UserError, match=r"^attention.kernel=triton reads one latent as key and value"):
        benchmark_decode.main([*MICRO, f"out={tmp_path}", "attention=tpa", "kernel=triton", "contexts=8"])


def test_a_whole_model_beside_transformers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    said, record = measured(
        capsys,
        tmp_path,
        "contexts=8,24",
        "batch_sizes=1,2",
        "queries=1,4",
        "prefill_tokens=24",
        "attention.kv_lora_rank=12",
        "attention=gqa,mla,mla_plain",
    )
    rows = {(f["row"], f["batch_size"], f["context"], f["queries"]) for f in record["figures"]}
    for batch, context in ((1, 8), (1, 24), (2, 8), (2, 24)):
        for name in ("gqa", "mla expand", "mla absorbed", "mla_plain expand", "mla_plain absorbed"):
            assert (name, batch, context, 1) in rows
        for name in ("gqa, generate", "gqa, transformers", "mla, transformers", "mla_plain, generate"):
            assert ((name, batch, context, 1) in rows) == (batch * context <= 24)
    assert ("mla expand", 1, 24, 4) in rows and ("mla expand", 2, 24, 4) not in rows and ("gqa", 1, 24, 4) not in rows
    kernels = [f"{name}: one new token absorbed is computed by torch" for name in ("mla", "mla_plain")]
    (remark,) = set(record["notes"]) - set(kernels)
    assert remark.startswith("no transformers beside mla_plain: ") and all(note in said for note in (remark, *kernels))
    assert {(c["axis"], c["batch_size"], c["context"]) for c in record["crossovers"] if c["variant"] == "mla"} == {
        ("context", 1, None),
        ("context", 2, None),
        ("queries", 1, 8),
        ("queries", 1, 24),
    }
    for crossover in record["crossovers"]:
        assert crossover["words"] in said

    assert record == json.loads((tmp_path / "decode.json").read_text())
    with (tmp_path / "decode.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [float(line["call_median"]) for line in lines] == [f["call"]["median"] for f in record["figures"]]
    assert (tmp_path / "decode.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(map(str, tmp_path.iterdir())) == sorted(record["files"])


def test_attention_alone_beside_the_expanded_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said, record = measured(
        capsys,
        tmp_path,
        "level=attention",
        "contexts=8,600000",
        "batch_sizes=1",
        "cache.dtype=bfloat16",
        "memory_budget_gib=0.03",
    )
    rows = ["mha", "gqa", "mqa", "mla expand", "mla absorbed", "mla, expanded cache (SDPA)"]
    assert [f["row"] for f in record["figures"]] == rows
    assert [s["row"] for s in record["skipped"]] == rows
    assert said.count("skipped: takes about") == len(rows)
    cache = {f["row"]: f["cache_bytes_per_token"] for f in record["figures"]}  # one layer, bfloat16
    assert cache["mla expand"] == 2 * (16 + 8) and cache["mla, expanded cache (SDPA)"] == 2 * 2 * 2 * (16 + 8)
    assert "attention alone, 1 of 2 layers" in said


def test_an_option_of_a_kind_of_layers_is_for_the_variants_that_have_the_kind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["attention=swa_1_1,gqa", "attention.kinds.local.window=8", "contexts=32", "batch_sizes=1", "peers=false"]
    _, record = measured(capsys, tmp_path, *options)
    token = 4 * 2 * 2 * 16  # of a layer: float32, two groups, key and value
    sizes = {f["row"]: f["cache_bytes"] for f in record["figures"]}
    assert sizes == {"swa_1_1": (8 + 32) * token, "gqa": 2 * 32 * token}


def test_a_run_is_measured_at_its_own_shape_and_vocabulary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    save_run_config(config_at("attention=mla", "tokenizer=bytes"), tmp_path / "runs" / "mine")
    words = [word for word in MICRO if not word.startswith(("model.", "vocab_size"))]
    run = ["run=mine", f"runs_dir={tmp_path / 'runs'}", f"out={tmp_path / 'out'}", "contexts=8", "peers=false"]
    assert benchmark_decode.main([*words, *run]) == 0
    (record,) = records(capsys.readouterr().out)
    assert record["vocab_size"] > 255 and {f["cache_bytes_per_token"] for f in record["figures"]} == {4 * 2 * (24 + 6)}
    assert {f["row"] for f in record["figures"]} == {"mla expand", "mla absorbed"}


def test_a_peer_that_computes_something_else_is_not_timed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(benchmark_decode, "LARGEST_DIFFERENCE", 1e-12)
    _, record = measured(capsys, tmp_path, "attention=mla", "contexts=8", "batch_sizes=1")
    assert [f["row"] for f in record["figures"]] == ["mla expand", "mla absorbed", "mla, generate"]
    assert "its logits differ by" in record["notes"][0]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["attention=mhaa"], r"attention=mhaa does not exist; did you mean mha\?"),
        (["contxts=8"], r"contxts is not an option here; did you mean contexts\?"),
        (["contexts=8,x"], r"contexts=8,x must be whole numbers .*, as in contexts=1,2"),
        (["batch_sizes=0"], r"batch_sizes=0 must be different whole numbers from 1 on"),
        (["level=layer"], r"level=layer is unknown"),
        (["decode=absorb"], r"decode=absorb is unknown; did you mean absorbed\?"),
        (["step=graph"], r"step=graph needs a CUDA device, not cpu"),
        (["rounds=0"], r"rounds=0 must be 1 or more"),
        (["memory_budget_gib=0.0001"], r"weights of 4 variants take \d.\d MiB, more than memory_budget_gib=0.0001"),
        (["memory_budget_gib=-1"], r"memory_budget_gib=-1 is too small"),
        (["attention=gqa", "attention.kv_lora_rank=8"], r"attention.kv_lora_rank is a field of none of gqa"),
        (["attention=gqa", "attention.kinds.local.window=8"], r"attention.kinds.local.window is a field of none of gqa"),
        (["attention=swa_1_1", "attention.kinds.loca.window=8"], r"did you mean attention.kinds.local.window\?"),
        (["attention=swa_1_1", "attention.kinds.local.windo=8"], r"did you mean attention.kinds.local.window\?"),
        (["attention=swa_1_1", "attention.kinds.local.window=9999"], r"window=9999 is longer than the context"),
        (["attention.decode=expand"], r"attention.decode is an option of its own here; write decode="),
        (["attention=mla_plain", "attention.positions=rope_after_up", "decode=absorbed"], r"is not a path of attention="),
        (["model.n_heads"], r"model.n_heads is not of the form key=value"),
        (["model.n_hads=2"], r"did you mean model.n_heads\?"),
        (["attention.kv_lora_rank=99", "attention=mla"], r"kv_lora_rank=99 compresses nothing"),
        (["attention.kv_lora_rank=99", "attention=mla", "level=attention"], r"kv_lora_rank=99 compresses nothing"),
        (["run=some"], r"stands beside run=..., which is a whole model: leave one out"),
        (["kernel=cuda"], r"kernel=cuda is unknown"),
        (["kernel=flashinfer", "step=graph"], r"kernel=flashinfer plans each step on the host, which no CUDA graph can hold"),
        (["kernel=triton", "queries=1,16"], r"kernel=triton computes calls of one new token, not queries=1,16"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(options: list[str], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=sentence) as refused:
        benchmark_decode.main([*MICRO, f"out={tmp_path / 'out'}", *options])
    assert len(str(refused.value).splitlines()) == 1 and not (tmp_path / "out").exists()


def test_a_cache_is_drawn_at_a_context_that_only_one_of_its_paths_fits() -> None:
    def at(row: str, context: int) -> DecodeTime:
        spread = Spread(1.0, 1.0, 1.0, 1)
        return DecodeTime(row, "mla", row, 8, context, 1, None, spread, 1.0, 1, 1.0, 1.0, context * 2**20, 2**20, None)

    figures = [at("expand", 1), at("expand", 2), at("absorbed", 1), at("absorbed", 2), at("absorbed", 4)]
    assert cache_lines(figures) == {"mla": [(1, 1.0), (2, 2.0), (4, 4.0)]}
