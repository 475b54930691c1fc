"""What a comparison promises: seeds are folded, nothing incomparable shares a table, and the picture can be read."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import shlex
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from harness.errors import UserError
from harness.report.colours import COLOURS, MARKERS, PAPER
from harness.report.comparison import (
    CONDITIONS,
    Comparison,
    as_text,
    compare,
    comparison_csv,
    comparison_markdown,
    scatter_points,
)
from harness.report.comparison_picture import scatter
from harness.report.plots import PNG_WIDTH, draw, save_png
from scripts import compare_runs
from tests.support.forks import Forks
from tests.support.micro import records
from tests.support.wandb_server import WandbServer

EIGHT_VARIANTS = {
    "mha": (2048, 1.620),
    "mha_learned": (2048, 1.655),
    "mha_decoupled": (1664, 1.622),
    "mha_wide": (3072, 1.612),
    "gqa": (1024, 1.625),
    "mqa": (512, 1.647),
    "mla_plain": (512, 1.651),
    "mla": (640, 1.6205),
}


def make_run(runs: Path, attention: str, seed: int = 0, *, name: str | None = None, **changes: Any) -> Path:
    folder = runs / (name or f"books-tiny-{attention}-seed{seed}")
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("written: first\n")
    cache, bits = EIGHT_VARIANTS[attention]
    summary = {
        "name": folder.name,
        "attention": attention,
        "model": "tiny",
        "dataset": "books",
        "seed": seed,
        "data_seed": seed,
        "parameters": 1_300_000,
        "tokens": 2_000_000,
        "steps": 500,
        "loss": 3.4,
        "perplexity": 30.0,
        "bits_per_byte": bits,
        "split": "validation",
        "evaluated_tokens": 65_536,
        "cache_bytes_per_token": cache,
        "cache_dtype": "bfloat16",
        "tokens_per_second": 12_000.0,
        "setup_hash": f"setup-of-{attention}",
        "data_fingerprint": "d" * 16,
        "tokenizer_fingerprint": "t" * 16,
        "device": "cpu",
        "torch": "2.13.0",
        "commit": "abc",
        "cache_ratio_to_mha": cache / 2048,
        "mha_cache_bytes_per_token": 2048,
    }
    (folder / "summary.json").write_text(json.dumps(summary | changes))
    return folder


def evaluate(run: Path, *, file: str = "books-test-00000000", **changes: Any) -> None:
    """What eval_model.py leaves in a run."""
    summary = json.loads((run / "summary.json").read_text())
    record = summary | {
        "split": "test",
        "evaluated_tokens": 9_000,
        "per_document": False,
        "stride_fraction": 0.5,
        "max_tokens": None,
        "precision": "float32",
        "device": "elsewhere",
    }
    (run / "evaluations").mkdir(exist_ok=True)
    (run / "evaluations" / f"{file}.json").write_text(json.dumps(record | changes))


QUANTISED = {"cache_dtype": "int8", "through_cache": True}
WINDOWED = {"through_cache": True, "cache_window": 64, "cache_sinks": 4}


def evaluate_on_caches(run: Path, **changes: Any) -> None:
    """Evaluations of eval_model.py without a cache, and through three, each a little worse; 256 tokens of context."""
    summary = json.loads((run / "summary.json").read_text())
    per_token, bits = summary["cache_bytes_per_token"], changes.pop("bits_per_byte", summary["bits_per_byte"])
    caches = [
        ({}, per_token, 256),
        (QUANTISED, per_token // 2 + 8, 256),
        (QUANTISED | {"cache_dtype": "fp8"}, per_token // 2 + 8, 256),
        (WINDOWED, per_token, 68),
    ]
    for number, (cache, size, slots) in enumerate(caches):
        evaluate(
            run,
            file=f"books-test-{number}",
            bits_per_byte=bits + number / 64,
            cache_bytes_per_token=size,
            cache_context=256,
            cache_bytes_at_context=size * slots,
            **({"through_cache": False} | cache),
            **changes,
        )


def only_table(comparison: Comparison) -> dict[str, Any]:
    (table,) = comparison.tables
    return {setup.variant: setup for setup in table.setups}


def test_seeds_of_one_setup_become_mean_and_sample_deviation(tmp_path: Path) -> None:
    bits = [1.50, 1.53, 1.59]
    for seed, value in enumerate(bits):
        figures = {"bits_per_byte": value, "perplexity": 20.0 + seed, "loss": 3.0 + seed / 10}
        make_run(tmp_path, "mla", seed, tokens_per_second=100.0 * (seed + 1), **figures)
    make_run(tmp_path, "mha")
    comparison = compare([tmp_path])
    rows = only_table(comparison)
    mla, mha = rows["mla"], rows["mha"]
    assert (mla.n, mla.seeds) == (3, [0, 1, 2])
    assert mla.bits_per_byte == pytest.approx(statistics.fmean(bits))
    assert mla.deviations["bits_per_byte"] == pytest.approx(statistics.stdev(bits))
    assert (mla.means["perplexity"], mla.deviations["perplexity"], mla.means["tokens_per_second"]) == (21.0, 1.0, 200.0)
    assert (mla.means["loss"], mla.deviations["loss"]) == (pytest.approx(3.1), pytest.approx(0.1))
    assert (mha.n, mha.deviations["bits_per_byte"]) == (1, None)
    names, *lines = comparison.tables[0].cells()
    place = names.index("nats per token")
    assert names[place : place + 3] == ["nats per token", "perplexity", "bits per byte"]
    assert [line[place] for line in lines] == ["3.1000 ± 0.1000", "3.4000"]


def test_means_over_few_seeds_carry_their_count_an_interval_and_a_caution(tmp_path: Path) -> None:
    """By hand: t(0.975, 2) = 4.3027; each row's own interval is wider than the pooled one of 4 degrees of freedom."""
    bits = {"mha": [1.50, 1.52, 1.54], "mla": [1.51, 1.52, 1.56]}
    for attention, values in bits.items():
        for seed, value in enumerate(values):
            make_run(tmp_path, attention, seed, bits_per_byte=value)
    comparison = compare([tmp_path])
    (table,) = comparison.tables
    halves = {name: 4.302653 * statistics.stdev(values) / 3**0.5 for name, values in bits.items()}
    rows = only_table(comparison)
    assert {name: setup.bits_per_byte_half_width for name, setup in rows.items()} == pytest.approx(halves)
    low, high = stats.ttest_ind(bits["mla"], bits["mha"], equal_var=False).confidence_interval()
    assert table.caution.startswith("n = 3 seeds a row") and "(0.0235, 4 degrees of freedom)" in table.caution
    assert table.caution.endswith(f"not told apart from mha: mla (+0.010 ± {(high - low) / 2:.3f})")
    for text in (as_text(comparison), comparison_markdown(comparison)):
        assert table.caution in text and f"± {halves['mha']:.4f}" in text


def test_what_was_trained_on_from_the_same_runs_is_compared_seed_by_seed(tmp_path: Path) -> None:
    before, after = [1.50, 1.52, 1.55], [1.52, 1.541, 1.571]
    for seed in range(3):
        make_run(tmp_path / "alone", "mha", seed, bits_per_byte=before[seed])
        make_run(tmp_path / "alone", "mla", seed, bits_per_byte=after[seed])
    told = compare([tmp_path / "alone"]).tables[0].caution
    assert "not told apart from mha: mla" in told and "(0.0254, 4 degrees of freedom)" in told
    for seed in range(3):
        make_run(tmp_path / "begun", "mha", seed, bits_per_byte=before[seed])
        make_run(tmp_path / "begun", "mla", seed, bits_per_byte=after[seed], init_from=f"/elsewhere/books-tiny-mha-seed{seed}")
    told = compare([tmp_path / "begun"]).tables[0].caution
    assert "not told apart" not in told and "2 degrees of freedom" in told, "a deviation of 0.0006 against 0.025"


def test_the_command_that_makes_what_is_lacking_names_each_folder_as_a_shell_reads_it(tmp_path: Path) -> None:
    one, two = tmp_path / "of mine", tmp_path / "other"
    evaluate(make_run(two, "mha"))
    lacking = [make_run(one, "mla"), make_run(one, "gqa"), make_run(two, "mqa")]
    (said,) = (note for note in compare([one, two]).notes if "make it with: " in note)
    commands = [shlex.split(command) for command in said.partition("make it with: ")[2].split(" && ")]
    assert commands == [
        ["python", "eval_model.py", "run=all", "split=test", f"runs_dir={one}"],
        ["python", "eval_model.py", f"run={lacking[-1]}", "split=test"],
    ]


def test_single_seeds_are_ranked_with_a_caution(tmp_path: Path) -> None:
    for attention in ("mha", "mla"):
        make_run(tmp_path, attention)
    (table,) = compare([tmp_path]).tables
    assert table.caution.startswith("one seed each") and "the order may be chance" in table.caution
    assert "95 %" not in table.cells()[0]


def test_the_best_stands_first(tmp_path: Path) -> None:
    for attention in EIGHT_VARIANTS:
        make_run(tmp_path, attention)
    (table,) = compare([tmp_path]).tables
    figures = [setup.bits_per_byte for setup in table.setups]
    assert len(figures) == 8 and figures == sorted(figures)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_what_cannot_be_compared_never_shares_a_table(condition: str, tmp_path: Path) -> None:
    values = {
        "per_document": True,
        "tokens": 500_000,
        "evaluated_tokens": 77,
        "stride_fraction": 0.25,
        "through_cache": True,
        "cache_window": 64,
        "cache_sinks": 4,
    }
    other = values.get(condition, "another")
    make_run(tmp_path, "mha")
    make_run(tmp_path, "gqa")
    make_run(tmp_path, "mla", **{condition: other})
    comparison = compare([tmp_path])
    assert [[setup.variant for setup in table.setups] for table in comparison.tables] == [["mha", "gqa"], ["mla"]]
    first, second = (table.heading for table in comparison.tables)
    assert CONDITIONS[condition].format(other) in second and CONDITIONS[condition].format(other) not in first
    assert any(f"differ in {condition}" in note for note in comparison.notes)
    with pytest.raises(UserError, match=f"differ in {condition} .*strict"):
        compare([tmp_path], strict=True)


@pytest.mark.parametrize(
    ("way", "said"), [({"stride_fraction": 0.25}, "stride_fraction=0.25"), ({"per_document": True}, "per_document=True")]
)
def test_an_unusual_way_of_scoring_is_said_where_all_runs_share_it(way: dict[str, Any], said: str, tmp_path: Path) -> None:
    runs = [make_run(tmp_path, attention) for attention in ("mha", "mla")]
    for run in runs:
        evaluate(run)
    assert not any(word in compare([tmp_path]).tables[0].heading for word in ("stride", "per_document"))
    for run in runs:
        evaluate(run, file="books-test-00000000", **way)
    assert said in compare([tmp_path]).tables[0].heading


def test_test_figures_are_used_and_a_run_without_them_is_listed_and_changes_nothing(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, attention) for attention in ("mha", "mla", "gqa")]
    assert [table.conditions["split"] for table in compare([tmp_path]).tables] == ["validation"]
    evaluate(runs[0], bits_per_byte=1.4)
    evaluate(runs[1], bits_per_byte=1.3)
    comparison = compare([tmp_path])
    assert {name: setup.bits_per_byte for name, setup in only_table(comparison).items()} == {"mla": 1.3, "mha": 1.4}
    assert comparison.tables[0].conditions["split"] == "test"
    assert comparison.lacking == ["books-tiny-gqa-seed0"]
    said = "without this evaluation, so in no table: books-tiny-gqa-seed0; make it with: python eval_model.py run="
    assert any(note.startswith(said) for note in comparison.notes)
    with pytest.raises(UserError, match=r"1 runs lack the evaluation .*books-tiny-gqa-seed0.*strict=true"):
        compare([tmp_path], strict=True)
    assert only_table(compare([tmp_path], split="validation"))["mha"].bits_per_byte == 1.62


def test_runs_of_other_training_keep_their_validation_table(tmp_path: Path) -> None:
    """Nothing that they have can stand beside the others, so nothing of the others depends on them."""
    evaluate(make_run(tmp_path, "mha"), bits_per_byte=1.4)
    make_run(tmp_path, "mla", name="short", tokens=1000, setup_hash="short")
    comparison = compare([tmp_path])
    splits = {table.setups[0].variant: table.conditions["split"] for table in comparison.tables}
    assert splits == {"mha": "test", "mla": "validation"} and comparison.lacking == []
    assert any("final validation figures of each run, of short (for the test" in note for note in comparison.notes)


def test_an_evaluation_of_a_part_is_compared_only_by_its_name(tmp_path: Path) -> None:
    for attention, bits in (("mha", 1.4), ("mla", 1.3)):
        run = make_run(tmp_path, attention)
        evaluate(run, file="books-test-whole", bits_per_byte=bits, finished_at="2026-01-01T00:00:00+00:00")
        evaluate(
            run,
            file="books-test-part",
            bits_per_byte=bits / 2,
            max_tokens=8000,
            evaluated_tokens=8000,
            finished_at="2026-01-02T00:00:00+00:00",
        )
    evaluate(make_run(tmp_path, "gqa"), file="books-test-part", max_tokens=8000, evaluated_tokens=8000)
    comparison = compare([tmp_path])
    assert {name: row.bits_per_byte for name, row in only_table(comparison).items()} == {"mla": 1.3, "mha": 1.4}
    assert "scored on 9,000 tokens" in comparison.tables[0].heading and comparison.lacking == ["books-tiny-gqa-seed0"]
    assert "evaluation=NAME or =max_tokens=N: books-test-part (8,000 tokens, 3 runs)" in " ".join(comparison.notes)
    part = compare([tmp_path], evaluation="books-test-part")
    assert {name: row.bits_per_byte for name, row in only_table(part).items()} == {"mla": 0.65, "mha": 0.7, "gqa": 1.625}
    assert "scored on 8,000 tokens" in part.tables[0].heading and part.lacking == []
    assert compare([tmp_path], evaluation="max_tokens=8000").tables == part.tables
    with pytest.raises(UserError, match=r"no run has an evaluation=other; there are: books-test-part .*books-test-whole"):
        compare([tmp_path], evaluation="other")
    with pytest.raises(UserError, match=r"leave out split"):
        compare([tmp_path], evaluation="books-test-part", split="test")


def test_only_partial_evaluations_leave_the_validation_figures(tmp_path: Path) -> None:
    evaluate(make_run(tmp_path, "mha"), file="books-test-part", max_tokens=500, evaluated_tokens=500)
    comparison = compare([tmp_path])
    assert comparison.tables[0].conditions["split"] == "validation"
    assert any("books-test-part (500 tokens, 1 run)" in note for note in comparison.notes)


def test_all_caches_of_a_named_part_stand_in_one_table(tmp_path: Path) -> None:
    part = {"max_tokens": 500, "evaluated_tokens": 500}
    for attention in ("mha", "mla"):
        run = make_run(tmp_path, attention)
        evaluate_on_caches(run, **part)
        evaluate(run, file="whole", through_cache=False)
    rows = only_table(compare([tmp_path], evaluation="max_tokens=500", every_cache=True))
    assert len(rows) == 8 and {"mla", "mla, int8", "mha, window 64, 4 sinks"} <= set(rows)
    assert set(only_table(compare([tmp_path], every_cache=True))) == {"mha", "mla"}


def test_a_limit_that_the_split_does_not_reach_is_no_part(tmp_path: Path) -> None:
    evaluate(make_run(tmp_path, "mha"), bits_per_byte=1.4, max_tokens=10_000)
    assert only_table(compare([tmp_path]))["mha"].bits_per_byte == 1.4


def test_every_table_says_how_many_tokens_were_scored(tmp_path: Path) -> None:
    make_run(tmp_path, "mha")
    assert "validation split, scored on 65,536 tokens" in compare([tmp_path]).tables[0].heading


def test_of_equal_evaluations_the_newest_by_its_own_time_counts(tmp_path: Path) -> None:
    run = make_run(tmp_path, "mha")
    evaluate(run, file="new", bits_per_byte=1.4, finished_at="2026-02-01T00:00:00+00:00")
    evaluate(run, file="old", bits_per_byte=1.5, finished_at="2026-01-31T00:00:00+00:00")  # copied later
    assert only_table(compare([tmp_path]))["mha"].bits_per_byte == 1.4


def test_a_split_asked_for_and_missing_is_refused_with_the_command(tmp_path: Path) -> None:
    make_run(tmp_path, "mha")
    with pytest.raises(UserError, match=r"none of 1 runs has .* python eval_model.py run=\S+-mha-seed0 split=test"):
        compare([tmp_path], split="test")
    with pytest.raises(UserError, match="dataset=wikitext2"):
        compare([tmp_path], dataset="wikitext2")


def test_evaluations_on_another_corpus_count_only_when_asked_for(tmp_path: Path) -> None:
    for attention in ("mha", "mla"):
        run = make_run(tmp_path, attention)
        evaluate(run, file="wikitext2-test-1", dataset="wikitext2", data_fingerprint="w" * 16, bits_per_byte=2.5)
    assert compare([tmp_path]).tables[0].conditions["split"] == "validation"
    asked = compare([tmp_path], dataset="wikitext2")
    assert asked.tables[0].conditions["dataset"] == "wikitext2"
    assert only_table(asked)["mla"].bits_per_byte == 2.5


def test_of_several_evaluations_the_kind_that_all_runs_have_is_compared(tmp_path: Path) -> None:
    mha, mla = make_run(tmp_path, "mha"), make_run(tmp_path, "mla")
    evaluate(mha, file="whole", bits_per_byte=1.4)
    evaluate(mla, file="whole", bits_per_byte=1.3)
    evaluate(mla, file="part", bits_per_byte=1.1, max_tokens=100, evaluated_tokens=100)
    os.utime(mla / "evaluations" / "part.json", (time.time() + 10,) * 2)  # the newest
    rows = only_table(compare([tmp_path]))
    assert (rows["mha"].bits_per_byte, rows["mla"].bits_per_byte) == (1.4, 1.3)


def test_evaluations_without_a_cache_are_compared_unless_all_are_asked_for(tmp_path: Path) -> None:
    mha, mla = make_run(tmp_path, "mha"), make_run(tmp_path, "mla")
    evaluate(mha, bits_per_byte=1.4)  # before evaluations knew caches: no such keys
    evaluate_on_caches(mla)
    for run in (mha, mla):
        evaluate(run, file="newest", **QUANTISED)
        os.utime(run / "evaluations" / "newest.json", (time.time() + 10,) * 2)
    comparison = compare([tmp_path])
    rows = only_table(comparison)
    assert (rows["mha"].bits_per_byte, rows["mla"].bits_per_byte) == (1.4, 1.6205)
    assert (rows["mha"].through_cache, rows["mha"].cache_window, rows["mha"].cache_bytes_at_context) == (False, None, None)
    header = as_text(comparison).splitlines()[2]
    assert header.split("  ")[-1] == "x MHA" and "cache bytes/token" in header and "cache bytes at" not in header
    assert "through" not in comparison.tables[0].heading and "window" not in comparison.tables[0].heading


def test_a_run_without_a_plain_evaluation_is_listed_and_alone_has_a_table(tmp_path: Path) -> None:
    evaluate(make_run(tmp_path, "mha"))
    evaluate(make_run(tmp_path, "mla"), **WINDOWED)
    comparison = compare([tmp_path])
    assert [[setup.variant for setup in table.setups] for table in comparison.tables] == [["mha"]]
    assert comparison.lacking == ["books-tiny-mla-seed0"]
    (alone,) = compare([tmp_path / "books-tiny-mla-seed0"]).tables
    assert "through_cache=True, window 64, 4 sinks" in alone.heading


def test_all_caches_stand_in_one_table_with_their_seeds_folded(tmp_path: Path) -> None:
    for seed in (0, 1):
        evaluate_on_caches(make_run(tmp_path, "mha", seed), bits_per_byte=1.5 + seed / 128)
    mla = make_run(tmp_path, "mla")
    evaluate_on_caches(mla, bits_per_byte=1.75)
    evaluate(mla, file="shorter", max_tokens=100, evaluated_tokens=100, **QUANTISED)
    comparison = compare([tmp_path], every_cache=True, strict=True)
    rows = only_table(comparison)
    assert list(rows) == [
        "mha",
        "mha, int8",
        "mha, fp8",
        "mha, window 64, 4 sinks",
        "mla",
        "mla, int8",
        "mla, fp8",
        "mla, window 64, 4 sinks",
    ]
    assert [row.n for row in rows.values()] == [2] * 4 + [1] * 4
    for number, row in enumerate(list(rows.values())[:4]):
        assert row.bits_per_byte == pytest.approx(1.5 + 1 / 256 + number / 64)
        assert row.deviations["bits_per_byte"] == pytest.approx(statistics.stdev([0, 1 / 128]))
    assert comparison.tables[0].heading.endswith("cache in bfloat16 where a row says nothing else")
    assert any("evaluation=NAME or =max_tokens=N: shorter (100 tokens, 1 run)" in note for note in comparison.notes)


def test_caches_scored_on_different_seeds_are_said(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, "mha", seed) for seed in (0, 1)]
    for run in runs:
        evaluate_on_caches(run)
    assert not any("different seeds" in note for note in compare([tmp_path], every_cache=True).notes)
    (runs[1] / "evaluations" / "books-test-1.json").unlink()
    assert any("caches of mha were scored on different seeds" in note for note in compare([tmp_path], every_cache=True).notes)


def test_the_size_of_a_cache_among_others_is_that_of_a_token_of_context(tmp_path: Path) -> None:
    for attention in ("mha", "mla"):
        evaluate_on_caches(make_run(tmp_path, attention))
    comparison = compare([tmp_path], every_cache=True)
    rows, (table,) = only_table(comparison), comparison.tables
    sizes = {name: table.cache_size(setup) for name, setup in rows.items()}
    assert sizes["mha"] == rows["mha"].means["cache_bytes_per_token"] == 2048
    assert sizes["mha, int8"] == 2048 / 2 + 8
    assert sizes["mha, window 64, 4 sinks"] == 2048 * 68 / 256 != rows["mha, window 64, 4 sinks"].means["cache_bytes_per_token"]
    assert all(row.means["cache_ratio_to_mha"] == sizes[name] / 2048 for name, row in rows.items())
    text = comparison_markdown(comparison)
    assert (
        "| cache bytes/token at 256 tokens | cache bytes at 256 tokens | x MHA |" in text
        and f"| {2048 * 68:,} | {68 / 256:.3f} |" in text
    )


def curve(per_token: int, window: int | None = None) -> dict[str, int]:
    return {str(context): per_token * min(context, window or context) for context in (1024, 8192, 32768, 131072)}


def test_the_cache_of_a_long_context_stands_in_the_table_the_csv_and_a_picture(tmp_path: Path) -> None:
    for attention, window in (("mha", None), ("gqa", 64)):
        run = make_run(tmp_path, attention)
        evaluate(run, cache_bytes_by_context=curve(2048, window))
    make_run(tmp_path, "mla")
    evaluate(tmp_path / "books-tiny-mla-seed0")  # older: it says none
    comparison = compare([tmp_path])
    lines = comparison_markdown(comparison).splitlines()
    assert lines[2].endswith("| x MHA | MiB at 1k | at 8k | at 32k | at 128k |")
    assert "trained on " in lines[0] and "| tokens |" not in lines[2]
    rows_of = {cells[0]: cells for line in lines if len(cells := line[2:-2].split(" | ")) > 5}
    cells = {name: rows_of[name][-4:] for name in ("mha", "gqa", "mla")}
    assert cells == {"mha": ["2", "16", "64", "256"], "gqa": ["0.125"] * 4, "mla": [""] * 4}
    rows = list(csv.DictReader(io.StringIO(comparison_csv(comparison))))
    assert {(row["variant"], row["cache_bytes_at_1024"], row["cache_bytes_at_131072"]) for row in rows} == {
        ("mha", str(2048 * 1024), str(2048 * 131072)),
        ("gqa", str(2048 * 64), str(2048 * 64)),
        ("mla", "", ""),
    }
    _, below = panels_of(comparison)
    drawn = {tuple(map(tuple, line.get_xydata())) for line in below.lines if len(line.get_xydata()) == 4}
    contexts = (1024, 8192, 32768, 131072)
    assert {tuple((c, 2048 * min(c, window) / 2**20) for c in contexts) for window in (64, 10**9)} <= drawn
    assert (below.get_xscale(), below.get_yscale()) == ("log", "log")


def test_contexts_that_differ_are_said_in_every_row(tmp_path: Path) -> None:
    evaluate_on_caches(make_run(tmp_path, "mla"))
    evaluate(make_run(tmp_path, "mqa"), cache_context=512, cache_bytes_at_context=512 * 512)
    evaluate(make_run(tmp_path, "gqa"))
    text = comparison_markdown(compare([tmp_path], every_cache=True))
    assert "| cache bytes/token | cache bytes |" in text
    assert f"| 640 at 256 | {640 * 256:,} at 256 |" in text and f"| 512 at 512 | {512 * 512:,} at 512 |" in text
    (old,) = (line for line in text.splitlines() if line.startswith("| gqa |"))
    assert "| 1,024 |  | 0.500 |" in old
    plain = compare([tmp_path])
    text = comparison_markdown(plain)
    assert "| cache bytes/token | x MHA |" in text
    assert "| 640 at 256 | 0.312 |" in text and "| 512 at 512 | 0.250 |" in text and "| 1,024 | 0.500 |" in text
    assert panels_of(plain)[0].get_xlabel() == "KV cache, bytes per token in bfloat16 (log scale)"
    (tmp_path / "known").mkdir()
    for attention in ("mla", "mqa"):
        (tmp_path / f"books-tiny-{attention}-seed0").rename(tmp_path / "known" / attention)
    known = compare([tmp_path / "known"])
    at = "at 256\N{EN DASH}512 tokens"
    assert panels_of(known)[0].get_xlabel() == f"KV cache, bytes per token in bfloat16 {at} (log scale)"
    assert scatter_points(known.tables[0], "loss")[0][1] == f"cache bytes per token {at}"


def test_a_context_is_said_over_the_bytes_only_where_every_row_has_it_and_in_no_name_of_the_csv(tmp_path: Path) -> None:
    for attention in ("mla", "mqa"):
        evaluate_on_caches(make_run(tmp_path, attention))
    text = comparison_markdown(compare([tmp_path]))
    assert "| cache bytes/token at 256 tokens | x MHA |" in text and "| 640 | 0.312 |" in text
    evaluate(make_run(tmp_path, "gqa"))  # older: of which context its bytes are is not known
    comparison = compare([tmp_path])
    text = comparison_markdown(comparison)
    assert "| cache bytes/token | x MHA |" in text and "cache bytes/token  x MHA" in as_text(comparison)
    assert "| 640 at 256 | 0.312 |" in text and "| 1,024 | 0.500 |" in text
    rows = list(csv.DictReader(io.StringIO(comparison_csv(comparison))))
    assert {(row["cache_bytes_per_token"], row["cache_context"]) for row in rows} == {
        ("640", "256"),
        ("512", "256"),
        ("1024", ""),
    }


def test_among_all_caches_the_ratio_is_to_mha_in_bfloat16(tmp_path: Path) -> None:
    evaluate(make_run(tmp_path, "mla"))
    mha = make_run(tmp_path, "mha")
    evaluate(mha, file="quantised", cache_bytes_per_token=1032, **QUANTISED)
    evaluate(mha, file="wide", cache_bytes_per_token=4096, cache_dtype="float32")
    evaluate(mha, file="plain")
    rows = only_table(compare([tmp_path], every_cache=True))
    assert {name: row.means["cache_ratio_to_mha"] for name, row in rows.items()} == {
        "mha, bfloat16": 1.0,
        "mha, float32": 2.0,
        "mha, int8": 1032 / 2048,
        "mla, bfloat16": 640 / 2048,
    }


def test_caches_of_one_dtype_are_told_apart(tmp_path: Path) -> None:
    run = make_run(tmp_path, "mha")
    evaluate(run, file="plain")
    evaluate(run, file="through", through_cache=True)
    evaluate(run, file="window", through_cache=True, cache_window=64)
    evaluate(run, file="one", through_cache=True, cache_window=64, cache_sinks=1)
    evaluate(run, file="both", **QUANTISED | WINDOWED)
    assert set(only_table(compare([tmp_path], every_cache=True))) == {
        "mha",
        "mha, through the cache",
        "mha, window 64",
        "mha, window 64, 1 sink",
        "mha, int8, window 64, 4 sinks",
    }
    evaluate(make_run(tmp_path, "gqa", cache_dtype="int8"), file="other-protocol", max_tokens=5)
    quoted = only_table(compare([tmp_path], every_cache=True, split="validation"))
    assert set(quoted) == {"mha, bfloat16", "gqa, int8, quoted"}


def test_setups_of_one_variant_are_told_apart_by_the_names_of_their_runs(tmp_path: Path) -> None:
    """A default name without what all of them share; one that a user chose as it stands, whatever words it has."""
    chosen = {"ablation-tiny-of-mine-1": "a", "ablation-tiny-of-mine-2": "b", "books-tiny-gqa-n_kv_heads=1": "c"}
    for name, setup in chosen.items():
        evaluate(make_run(tmp_path, "gqa", 3, name=f"{name}-seed3", setup_hash=setup))
    (table,) = compare([tmp_path]).tables
    assert {setup.variant for setup in table.setups} == {*list(chosen)[:2], "gqa-n_kv_heads=1"}


def test_only_the_seeds_of_a_run_are_cut_from_its_name(tmp_path: Path) -> None:
    for name in ("rank-seed16", "rank-seed32"):
        make_run(tmp_path / "chosen", "mla", name=name, setup_hash=name)
    for name, setup in {"far-seed16-seed0": "a", "near-seed0-data7": "b", "other-seed0": "c", "seen-data7": "d"}.items():
        make_run(tmp_path / "default", "mla", name=name, setup_hash=setup, data_seed=7)
    (chosen,), (default,) = compare([tmp_path / "chosen"]).tables, compare([tmp_path / "default"]).tables
    assert {setup.variant for setup in chosen.setups} == {"rank-seed16", "rank-seed32"}
    assert {setup.variant for setup in default.setups} == {"far-seed16", "near", "other", "seen-data7"}


def test_no_two_setups_of_a_table_have_one_label(tmp_path: Path) -> None:
    """Shortened alike, like another setup's attention, or with one name in two folders."""
    for seed in (16, 32):
        make_run(tmp_path / "runs", "mla", seed, name=f"rank-seed{seed}", setup_hash=f"rank{seed}")
    for number in (0, 1):
        make_run(tmp_path / "runs" / str(number), "mla", name="again-seed0", setup_hash=f"again{number}")
    make_run(tmp_path / "runs", "mla", name="gqa-seed0", setup_hash="called-gqa")
    make_run(tmp_path / "runs", "gqa", name="of-gqa", setup_hash="gqa")
    folders = [tmp_path / "runs", *(tmp_path / "runs" / str(number) for number in (0, 1))]
    labels = [setup.variant for table in compare(folders).tables for setup in table.setups]
    expected = ["again-seed0 again0", "again-seed0 again1", "gqa-seed0", "of-gqa", "rank-seed16", "rank-seed32"]
    assert sorted(labels) == expected


def test_an_evaluation_done_again_is_one_row(tmp_path: Path) -> None:
    run = make_run(tmp_path, "mha")
    evaluate(run, file="named-otherwise-then", bits_per_byte=1.4)
    plain = {"through_cache": False, "cache_window": None, "cache_sinks": 0}
    evaluate(run, file="again", bits_per_byte=1.5, finished_at="2026-11-02T00:00:00.000000+00:00", **plain)
    evaluate(run, file="before", bits_per_byte=1.6, finished_at="2026-11-01T00:00:00.000000+00:00", **plain)
    for name in ("named-otherwise-then", "before"):  # what is copied last is not the newest
        os.utime(run / "evaluations" / f"{name}.json", (time.time() + 10,) * 2)
    rows = only_table(compare([tmp_path], every_cache=True))
    assert {name: (row.n, row.bits_per_byte) for name, row in rows.items()} == {"mha": (1, 1.5)}


def test_a_run_counts_once(tmp_path: Path) -> None:
    run = make_run(tmp_path, "mla")
    assert only_table(compare([run, tmp_path, run]))["mla"].n == 1
    make_run(tmp_path, "mla", name="the-same-again")
    comparison = compare([tmp_path])
    assert only_table(comparison)["mla"].n == 1
    assert any("the-same-again repeats books-tiny-mla-seed0" in note for note in comparison.notes)


def test_unfinished_runs_are_named_and_left_out(tmp_path: Path) -> None:
    make_run(tmp_path, "mha")
    (make_run(tmp_path, "mla") / "summary.json").unlink()
    comparison = compare([tmp_path])
    assert set(only_table(comparison)) == {"mha"}
    assert "left out, not finished: books-tiny-mla-seed0" in comparison.notes


def test_mistakes_are_said_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere is neither a run nor a folder of runs; train one"):
        compare([tmp_path / "nowhere"])
    run = make_run(tmp_path / "runs", "mha")
    (run / "summary.json").write_text('{"name": "cut o')
    with pytest.raises(UserError, match=r"summary\.json cannot be read as JSON"):
        compare([run])
    (run / "summary.json").write_text('{"name": "old"}')
    with pytest.raises(UserError, match="has no attention, model"):
        compare([run])
    (run / "summary.json").unlink()
    with pytest.raises(UserError, match=r"no run to compare .*not finished.*attention=mla"):
        compare([run])


def test_the_ratio_to_mha_is_each_runs_own_whatever_stands_beside_it(tmp_path: Path) -> None:
    """MHA runs of the same model's name but with more layers, or none at all, must not change it."""
    make_run(tmp_path, "mla")
    make_run(tmp_path, "mha", name="deeper", setup_hash="deeper", cache_bytes_per_token=9000, cache_ratio_to_mha=1.0)
    rows = only_table(compare([tmp_path]))
    assert {name: row.means["cache_ratio_to_mha"] for name, row in rows.items()} == {"mla": 640 / 2048, "mha": 1.0}


def test_what_an_overwriting_command_left_aside_is_no_run(tmp_path: Path) -> None:
    make_run(tmp_path, "mla", name=".books-tiny-mla-seed0.overwritten")
    make_run(tmp_path, "mha")
    assert set(only_table(compare([tmp_path]))) == {"mha"}


def test_setups_of_one_attention_are_told_apart(tmp_path: Path) -> None:
    make_run(tmp_path, "mla", 0)
    make_run(tmp_path, "mla", 1)
    make_run(tmp_path, "mla", 0, name="books-tiny-mla-kv_lora_rank=16-seed0", setup_hash="rank16")
    rows = only_table(compare([tmp_path]))
    assert {name: setup.n for name, setup in rows.items()} == {"mla": 2, "mla-kv_lora_rank=16": 1}


def test_differing_circumstances_are_said(tmp_path: Path) -> None:
    make_run(tmp_path, "mha")
    evaluated_elsewhere = compare([tmp_path]).notes
    assert not any("device" in note for note in evaluated_elsewhere)
    make_run(tmp_path, "mla", device="NVIDIA H200")
    assert "device differs (NVIDIA H200; cpu): speeds cannot be compared" in compare([tmp_path]).notes


def test_every_form_holds_every_row(tmp_path: Path) -> None:
    for attention in EIGHT_VARIANTS:
        for seed in (0, 1):
            make_run(tmp_path, attention, seed, bits_per_byte=EIGHT_VARIANTS[attention][1] + seed / 512)
    comparison = compare([tmp_path])
    rows = list(csv.DictReader(io.StringIO(comparison_csv(comparison))))
    assert [row["variant"] for row in rows] == [setup.variant for setup in comparison.tables[0].setups]
    assert all(
        float(row["bits_per_byte"]) == setup.bits_per_byte for row, setup in zip(rows, comparison.tables[0].setups, strict=True)
    )
    assert {row["tokens"] for row in rows} == {"2000000"} and {row["split"] for row in rows} == {"validation"}
    for text in (as_text(comparison), comparison_markdown(comparison)):
        assert all(f"{setup.bits_per_byte:.4f} ± 0.0014" in text for setup in comparison.tables[0].setups)
        assert "1,664" in text and comparison.tables[0].heading in text
    assert json.loads(json.dumps(dataclasses.asdict(comparison)))["tables"][0]["setups"][0]["attention"] == "mha_wide"


def test_caches_follow_into_every_form(tmp_path: Path) -> None:
    for attention in ("mha", "mla"):
        evaluate_on_caches(make_run(tmp_path, attention))
    plain, every = compare([tmp_path]), compare([tmp_path], every_cache=True)
    rows = list(csv.DictReader(io.StringIO(comparison_csv(every))))
    assert len(rows) == 8 and list(rows[0]) == list(csv.DictReader(io.StringIO(comparison_csv(plain))).fieldnames or [])
    (row,) = (row for row in rows if row["variant"] == "mla, window 64, 4 sinks")
    assert (row["cache_dtype"], row["cache_window"], row["through_cache"]) == ("bfloat16", "64", "True")
    assert float(row["cache_bytes_per_context_token"]) == int(row["cache_bytes_at_context"]) / 256 == 640 * 68 / 256
    assert all(row["variant"] in text for row in rows for text in (as_text(every), comparison_markdown(every)))
    (table,) = json.loads(json.dumps(dataclasses.asdict(every)))["tables"]
    assert {setup["variant"]: setup["cache"] for setup in table["setups"]}["mla, int8"] == "int8"


def crowded(runs: Path) -> Comparison:
    """Eight variants close together, most of them with the same cache, and a second table with single seeds."""
    for number, attention in enumerate(EIGHT_VARIANTS):
        for seed in (0, 1):
            bits = 1.62 + number * 0.0006 + seed * 0.0011
            cache = {"gqa": 1024, "mla": 640}.get(attention, 2048)
            make_run(runs, attention, seed, bits_per_byte=bits, cache_bytes_per_token=cache)
    make_run(runs, "mla", name="short-mla", tokens=1000, setup_hash="short")
    return compare([runs])


def on_caches(runs: Path) -> Comparison:
    """Six configurations on four caches each."""
    for attention in ("mha", "gqa", "mqa", "mla", "mla_plain", "mha_wide"):
        evaluate_on_caches(make_run(runs, attention))
    return compare([runs], every_cache=True)


@pytest.mark.parametrize(("make", "tables"), [(crowded, 2), (on_caches, 1)])
def test_no_name_in_the_picture_covers_another_or_a_marker(
    make: Callable[[Path], Comparison], tables: int, tmp_path: Path
) -> None:
    comparison = make(tmp_path)
    panels = panels_of(comparison)
    assert len(panels) == tables
    for axes, table in zip(panels, comparison.tables, strict=True):
        expected = sorted(setup.cache if setup.through_cache else setup.variant for setup in table.setups)
        names = [text for text in axes.texts if text.get_text() in expected]
        assert sorted(name.get_text() for name in names) == expected
        boxes = [name.get_window_extent() for name in names]
        for number, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[:number])
        for line in (container.lines[0] for container in axes.containers):
            ((x, y),) = line.get_transform().transform(line.get_xydata())
            assert not any(box.x0 < x + 4 and x - 4 < box.x1 and box.y0 < y + 4 and y - 4 < box.y1 for box in boxes)
        inside = axes.get_window_extent()
        assert all(inside.x0 <= box.x0 and box.x1 <= inside.x1 + 4 for box in boxes)


def panels_of(comparison: Comparison) -> list[Any]:
    return draw(scatter(comparison), PNG_WIDTH).figure.axes


def test_markers_can_be_told_apart_without_colour(tmp_path: Path) -> None:
    axes = panels_of(crowded(tmp_path))[0]
    markers = [container.lines[0] for container in axes.containers]
    assert len(markers) == 8
    assert len({line.get_marker() for line in markers}) == 8 and len({line.get_color() for line in markers}) == 8
    assert len(set(COLOURS)) == len(COLOURS) and len(set(MARKERS)) == len(MARKERS)
    assert axes.get_xscale() == "log"


def test_caches_of_a_configuration_share_colour_and_shape_and_are_joined(tmp_path: Path) -> None:
    comparison = on_caches(tmp_path)
    (axes,), (table,) = panels_of(comparison), comparison.tables
    looks: dict[str, set[tuple[Any, ...]]] = {}
    for container, setup in zip(axes.containers, table.setups, strict=True):
        marker = container.lines[0]
        looks.setdefault(setup.configuration, set()).add((marker.get_color(), marker.get_marker()))
        assert (marker.get_markerfacecolor() == PAPER) == setup.through_cache
    assert len(looks) == 6 and all(len(look) == 1 for look in looks.values()) and len(set.union(*looks.values())) == 6
    plain = {setup.configuration: setup for setup in table.setups if not setup.through_cache}
    lines = {tuple(map(tuple, line.get_xydata())) for line in axes.lines if len(line.get_xydata()) == 2}
    for setup in table.setups:
        ends = [(float(table.cache_size(one)), one.bits_per_byte) for one in (plain[setup.configuration], setup)]
        assert (tuple(ends) in lines) == setup.through_cache
    assert axes.get_xlabel() == "KV cache, bytes per token of context at 256 tokens (log scale)"


def test_error_bars_are_the_deviation_over_seeds(tmp_path: Path) -> None:
    comparison = crowded(tmp_path)
    axes = panels_of(comparison)[0]
    for container, setup in zip(axes.containers, comparison.tables[0].setups, strict=True):
        (low, high) = container.lines[2][0].get_segments()[0][:, 1]
        assert (high - low) / 2 == pytest.approx(setup.deviations["bits_per_byte"])
        assert (high + low) / 2 == pytest.approx(setup.bits_per_byte)


def test_the_picture_is_a_whole_png_in_place(tmp_path: Path) -> None:
    from PIL import Image

    comparison = crowded(tmp_path / "runs")
    save_png(scatter(comparison), tmp_path / "comparison.png")
    with Image.open(tmp_path / "comparison.png") as picture:
        picture.load()
        assert picture.width >= 1200
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["comparison.png"]


@pytest.mark.usefixtures("own_home")
def test_table_and_picture_reach_wandb(tmp_path: Path, forks: Forks) -> None:
    for attention in ("mha", "mla"):
        make_run(tmp_path / "runs", attention)
    out = tmp_path / "out"
    with WandbServer() as server:
        command = ["scripts/compare_runs.py", f"runs_dir={tmp_path / 'runs'}", f"out={out}"]
        done = forks.run(*command, environment=server.environment)
        assert done.status == 0, done.errors
        run = server.only_run()
    (record,) = records(done.output)
    assert [setup["attention"] for setup in record["tables"][0]["setups"]] == ["mha", "mla"]
    assert sorted(path.name for path in out.iterdir() if str(path) in done.output) == [
        "comparison.csv",
        "comparison.json",
        "comparison.md",
        "comparison.png",
    ]
    logged = {key: value for row in run.history for key, value in row.items()}
    table = json.loads(run.files[logged["comparison"]["path"]])
    assert [row[table["columns"].index("bits_per_byte")] for row in table["data"]] == [1.62, 1.6205]
    assert run.files[logged["bits_per_byte_against_cache"]["path"]] == (out / "comparison.png").read_bytes()
    for figure, values in (("bits_per_byte", [1.62, 1.6205]), ("perplexity", [30.0, 30.0])):
        chart = json.loads(run.files[logged[f"scatter/{figure}_table"]["path"]])
        assert chart["columns"] == ["variant", "cache bytes per token", figure, "seeds"]
        assert chart["data"] == [["mha", 2048, values[0], 1], ["mla", 640, values[1], 1]]
        panel = run.config["_wandb"]["visualize"][f"scatter/{figure}"]["panel_config"]
        assert panel["panelDefId"] == "wandb/scatter/v0"
        assert panel["fieldSettings"] == {"x": "cache bytes per token", "y": figure}
    assert run.job_type == "compare" and run.exit_code == 0


def test_the_script_takes_plain_or_all_caches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate_on_caches(make_run(tmp_path / "runs", "mla"))
    arguments = [f"runs_dir={tmp_path / 'runs'}", f"out={tmp_path / 'out'}", "tracking=none"]
    variants = {}
    for caches in ("plain", "all"):
        assert compare_runs.main([*arguments, f"caches={caches}"]) == 0
        (record,) = records(capsys.readouterr().out)
        variants[caches] = [setup["variant"] for table in record["tables"] for setup in table["setups"]]
        assert (tmp_path / "out" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert variants == {"plain": ["mla"], "all": ["mla", "mla, int8", "mla, fp8", "mla, window 64, 4 sinks"]}
    with pytest.raises(UserError, match=r"^caches=every is unknown; choose from all, plain$"):
        compare_runs.main([*arguments, "caches=every"])
