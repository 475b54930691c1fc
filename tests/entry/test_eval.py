"""eval_model.py: which runs it takes, what it says about them, and that its numbers are the training's own."""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import eval_model
import harness.runs.records
from harness.config.compose import check_config, load_eval_config
from harness.config.schema import EXTRAS
from harness.data import Tokenizer, open_prepared
from harness.errors import UserError
from harness.report.comparison import compare
from harness.runs.evaluate_run import lengthened, record_name
from harness.runs.load import load_trained
from harness.runs.to_dashboard import dashboard_figures
from tests.support.micro import PROMISED, Workplace, contents, json_lines, records, summary_of, write_corpus

VARIANTS = ("mha", "mla")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """Finished runs `mha` and, newer, `mla`, the latter with a BPE; and `begun`, which is not finished."""
    place = Workplace(tmp_path_factory.mktemp("shared"))
    place.train("mha")
    place.train("mla", "attention=mla", "tokenizer=bpe", "tokenizer.vocab_size=300")
    shutil.copytree(place.runs / "mha", place.runs / "begun")
    (place.runs / "begun" / "summary.json").unlink()
    for age, name in ((50, "mha"), (100, "mla")):  # a copied file's time says nothing, the summary's own does
        file = place.runs / name / "summary.json"
        os.utime(file, (file.stat().st_mtime - age,) * 2)
    return place


@pytest.fixture
def copied(shared: Workplace, tmp_path: Path) -> Workplace:
    """The same place without evaluations, free to be damaged."""
    place = Workplace(tmp_path / "copied")
    evaluated = shutil.ignore_patterns("evaluations", "segments")
    shutil.copytree(shared.folder, place.folder, dirs_exist_ok=True, ignore=evaluated)
    return place


def record_of(place: Workplace, capsys: pytest.CaptureFixture[str], *overrides: str) -> dict[str, Any]:
    """The record of an evaluation of one run."""
    capsys.readouterr()
    assert place.evaluate(*overrides) == 0
    (record,) = records(capsys.readouterr().out)
    return record


# --- which runs ------------------------------------------------------------------------------------------------------


def test_alone_it_takes_the_newest_finished_runs_test_split_and_names_the_others(
    shared: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shared.evaluate() == 0
    said = capsys.readouterr().out
    assert said.startswith("evaluating the newest finished run, mla; others (run=...): mha\n")
    (record,) = records(said)
    assert (record["name"], record["split"]) == ("mla", "test")


def test_all_runs_get_a_table_and_a_json_line_each(shared: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    assert shared.evaluate("run=all") == 0
    said = capsys.readouterr().out
    assert [record["name"] for record in json_lines(said)] == ["mha", "mla"]
    assert said.count("bits per byte     ") == said.count("\ncontext, tokens   1          2-3 ") == 2


@pytest.mark.parametrize("how", ["mha", "{runs}/mha", "{runs}/mha/"])
def test_a_run_is_found_by_name_and_by_folder(shared: Workplace, how: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert record_of(shared, capsys, f"run={how.format(runs=shared.runs)}")["name"] == "mha"


@pytest.mark.parametrize(
    ("run", "sentence"),
    [
        ("begun", r"run=begun is not finished; the command that started it continues it"),
        ("mhaa", r"run=mhaa is no run .*did you mean mha\?"),
        ("/nowhere", r"run=/nowhere is no run"),
    ],
)
def test_a_run_that_cannot_be_evaluated_is_one_sentence(shared: Workplace, run: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        shared.evaluate(f"run={run}")


@pytest.mark.parametrize("overrides", [[], ["run=all"]])
def test_without_any_finished_run_it_says_how_to_train_one(tmp_path: Path, overrides: list[str]) -> None:
    with pytest.raises(UserError, match=r"no finished run in .*python train_model.py attention=mla"):
        Workplace(tmp_path).evaluate(*overrides)


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("config.yaml", "name: [", r"config.yaml cannot be read .*restore it"),
        ("config.yaml", "- a\n- list\n", r"config.yaml is not a configuration .* group of fields.*restore it"),
        ("config.yaml", "name: mla\n", r"config.yaml is not a configuration .* is missing .*restore it"),
        ("summary.json", '{"name": "ml', r"summary.json cannot be read as JSON .*delete it"),
        ("summary.json", '{"name": "mla"}', r"summary.json lacks attention, .*delete it"),
        ("tokenizer.json", "{}", r"tokenizer.json is not a tokenizer.json .*: restore it, or copy the one of the data"),
        ("tokenizer.json", None, r"tokenizer.json cannot be read"),
        ("checkpoints/step-00000006/model.safetensors", "half", r"every checkpoint in .* is damaged"),
        ("checkpoints/step-00000006/manifest.json", None, r"every checkpoint in .* is damaged"),
    ],
)
def test_a_damaged_run_is_one_sentence(copied: Workplace, file: str, content: str | None, sentence: str) -> None:
    damaged = copied.runs / "mla" / file
    damaged.unlink()
    if content is not None:
        damaged.write_text(content)
    with pytest.raises(UserError, match=sentence) as refused:
        copied.evaluate("run=mla")
    assert len(str(refused.value).splitlines()) == 1
    assert not (copied.runs / "mla" / "evaluations").exists()


@pytest.mark.parametrize("name", ["test.bin", "test.words.npy"])
def test_a_corpus_with_other_content_of_the_same_size_is_not_scored(copied: Workplace, name: str) -> None:
    (folder,) = (file.parent for file in copied.folder.glob("data/*/meta.json") if "bpe" in file.read_text())
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-8] + b"\x7f" * 8)  # beyond the vocabulary
    with pytest.raises(
        UserError, match=rf"{name} has other content .*: copy .*{folder.name} again, or delete it and name the text"
    ):
        copied.evaluate("run=mla")
    assert not (copied.runs / "mla" / "evaluations").exists()
    shutil.rmtree(folder)
    assert copied.evaluate("run=mla", f"dataset.path={copied.corpus}") == 0


def test_a_field_that_another_version_wrote_names_the_file_and_the_field(copied: Workplace) -> None:
    config = copied.runs / "mla" / "config.yaml"
    config.write_text(config.read_text().replace("d_model:", "dmodel:"))
    with pytest.raises(UserError, match=r"mla/config.yaml .*model.dmodel is not a field.*did you mean d_model\?"):
        copied.evaluate("run=mla")


# --- what it says ----------------------------------------------------------------------------------------------------


def test_the_json_line_has_every_promised_key_and_stands_in_the_run(
    copied: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    record = record_of(copied, capsys, "run=mla")
    assert record.keys() >= PROMISED
    summary = summary_of(copied.runs / "mla")
    for key in (
        "name",
        "attention",
        "model",
        "dataset",
        "seed",
        "parameters",
        "tokens",
        "steps",
        "cache_dtype",
        "cache_bytes_per_token",
        "cache_elements_per_token_per_layer",
        "tokens_per_second",
    ):
        assert record[key] == summary[key], key
    assert record["perplexity"] == pytest.approx(math.exp(record["loss"]))
    (file,) = (copied.runs / "mla" / "evaluations").iterdir()
    assert json.loads(file.read_text()) == record


def test_an_evaluation_touches_nothing_else_in_the_run(copied: Workplace) -> None:
    before = contents(copied.runs / "mla")
    copied.evaluate("run=mla")
    after = contents(copied.runs / "mla")
    assert {name: after[name] for name in before} == before


def test_the_same_evaluation_replaces_its_record_and_another_stands_beside_it(copied: Workplace) -> None:
    for overrides in ([], ["batch_size=3"], ["split=validation"], ["stride_fraction=1"], ["per_document=true"]):
        copied.evaluate("run=mha", *overrides)
    assert len(list((copied.runs / "mha" / "evaluations").iterdir())) == 4


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_training_validated_with_exactly_this_number(
    shared: Workplace, variant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    record = record_of(shared, capsys, f"run={variant}", "split=validation", "max_tokens=65536")
    summary = summary_of(shared.runs / variant)
    figures = ("loss", "perplexity", "word_perplexity", "bits_per_byte", "evaluated_tokens")
    assert {key: record[key] for key in figures} == {key: summary[key] for key in figures}


def test_validation_on_a_part_with_another_stride_is_also_this_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["max_tokens=300", "stride_fraction=0.25"]
    place = Workplace(tmp_path)
    summary = summary_of(place.train("run", *(f"evaluation.{setting}" for setting in settings)))
    record = record_of(place, capsys, "split=validation", *settings)
    assert (record["loss"], record["evaluated_tokens"]) == (summary["loss"], 300)


def test_perplexity_does_not_depend_on_the_batch_size(shared: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    found = [record_of(shared, capsys, "run=mla", f"batch_size={size}")["perplexity"] for size in (1, 3, 64)]
    assert found == pytest.approx([found[0]] * 3, rel=1e-6)


def test_every_token_of_the_split_counts_once_whatever_the_stride(
    shared: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    for settings in ([], ["stride_fraction=1"], ["stride_fraction=0.1"], ["per_document=true"]):
        record = record_of(shared, capsys, "run=mha", *settings)
        (folder,) = (
            file.parent for file in shared.folder.glob("data/*/meta.json") if open_prepared(file.parent).vocab_size == 257
        )
        split = open_prepared(folder).splits["test"]
        assert (record["evaluated_tokens"], record["evaluated_bytes"]) == (split.n_tokens, split.n_bytes)
        nats = record["loss"] * split.n_tokens
        assert record["bits_per_byte"] == pytest.approx(nats / math.log(2) / split.n_bytes)
        assert record["word_perplexity"] == pytest.approx(math.exp(nats / split.n_words), rel=1e-6)


def test_the_loss_by_position_covers_the_window_without_gaps(shared: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    record = record_of(shared, capsys, "run=mha")
    bounds = [(low, high) for low, high, _ in record["loss_by_position"]]
    assert bounds[0][0] == 1 and bounds[-1][1] == 32
    assert all(low == high + 1 for (_, high), (low, _) in itertools.pairwise(bounds))


def test_cache_dtype_and_backend_are_chosen_by_the_evaluation(shared: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    plain = record_of(shared, capsys, "run=mla")
    other = record_of(shared, capsys, "run=mla", "cache.dtype=float32", "attention.backend=reference")
    assert other["cache_bytes_per_token"] == 2 * plain["cache_bytes_per_token"]
    assert other["kernel"] == "reference" != plain["kernel"]
    assert other["loss"] == pytest.approx(plain["loss"], rel=1e-5)


def test_weights_of_an_earlier_step_are_not_passed_off_as_the_trained_model(copied: Workplace) -> None:
    run = copied.train("short", "intervals.checkpoint=3")
    newest = sorted((run / "checkpoints").iterdir())[-1] / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"the last checkpoint of .*short \(step 6\) is damaged .*from step-00000003"):
        copied.evaluate("run=short")
    assert not (run / "evaluations").exists()


def test_a_broken_run_does_not_keep_the_others_from_being_evaluated(
    copied: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    (copied.runs / "mha" / "checkpoints").rename(copied.runs / "mha" / "elsewhere")
    with pytest.raises(UserError, match=r"^1 of 2 runs could not be evaluated: mha; see above$"):
        copied.evaluate("run=all")
    captured = capsys.readouterr()
    assert [record["name"] for record in json_lines(captured.out)] == ["mla"]
    assert "mha" in captured.err and "holds no checkpoint" in captured.err


def test_what_cannot_be_stored_is_at_least_printed(
    copied: Workplace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, values: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr("harness.runs.records.write_json", full)
    with pytest.raises(UserError, match=r"cannot be stored in .*mla .*: make the folder writable"):
        copied.evaluate("run=mla")
    assert [record["name"] for record in json_lines(capsys.readouterr().out)] == ["mla"]


# --- what perplexity hides -------------------------------------------------------------------------------------------


def test_every_extra_is_measured_unless_it_is_left_out_and_stands_in_the_table(
    copied: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert copied.evaluate("run=mla", "split=train") == 0
    said = capsys.readouterr().out
    (record,) = records(said)
    assert record["extras"].keys() == set(EXTRAS) and None not in record["extras"].values()
    assert record["extras"]["beyond"]["longest_context"] == 4 * 32
    assert record["extras"]["repeats"]["scored_tokens"] == record["evaluated_tokens"]
    for row in ("loss at 33-64 ", "loss at 65-128 ", "repeated 5-grams ", "latents  "):
        assert said.count(f"\n{row}") == 1, row
    few = record_of(copied, capsys, "run=mha", "extras=[repeats]", "extras_max_tokens=320")
    assert few["extras"].keys() == {"repeats"} and few["extras"]["repeats"]["scored_tokens"] == 320
    assert record_of(copied, capsys, "run=mla", "extras=[]")["extras"] == {}


def test_the_longer_model_holds_the_runs_weights_and_goes_on_where_its_own_window_ends(shared: Workplace) -> None:
    config = load_eval_config([*shared.places(), "run=mla"])
    trained = load_trained(shared.runs / "mla", device=torch.device("cpu"), precision=torch.float32, execution=config.attention)
    longer = lengthened(trained, 128)
    assert longer is not None and longer.max_seq_len == 128 and not longer.training
    tokens = torch.arange(32)[None]
    with torch.no_grad():
        assert torch.equal(longer(tokens), trained.model(tokens))
        assert longer(torch.arange(128)[None]).isfinite().any()


def test_what_does_not_apply_to_a_model_is_null_and_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = Workplace(tmp_path)
    place.train("learned", "attention=mha_learned")
    capsys.readouterr()
    assert place.evaluate("run=learned") == 0
    said = capsys.readouterr().out
    (record,) = records(said)
    assert (record["extras"]["beyond"], record["extras"]["latents"]) == (None, None)
    assert record["extras"]["repeats"]["count"] > 0
    assert "beyond            not measured: learned positions end at" in said
    assert "latents           not measured: no latents in this variant" in said


def test_segments_stand_beside_the_record_and_sum_to_it(copied: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    for overrides in ([], ["per_document=true"], ["max_tokens=700"]):
        record = record_of(copied, capsys, "run=mla", *overrides)
        name = record_name(record)
        assert (copied.runs / "mla" / "evaluations" / f"{name}.json").is_file()
        segments = json.loads((copied.runs / "mla" / "segments" / f"{name}.json").read_text())
        assert (segments["record"], segments["segment_tokens"]) == (name, 2048)
        assert sum(segments["tokens"]) == record["evaluated_tokens"]
        assert sum(segments["bytes"]) == record["evaluated_bytes"]
        assert sum(segments["nats"]) / record["evaluated_tokens"] == pytest.approx(record["loss"], rel=1e-12)


def test_no_two_evaluations_share_a_key_in_a_dashboard() -> None:
    """What tells two files apart tells two keys apart; a plain evaluation of the run's own corpus has the short one."""
    summary = {"data_fingerprint": "d" * 64, "precision": "float32", "cache_dtype": "bfloat16"}
    plain = {
        "dataset": "local",
        "corpus": "local_sea_123456",
        "split": "test",
        "data_fingerprint": "d" * 64,
        "cache_dtype": "bfloat16",
        "precision": "float32",
        "per_document": False,
        "stride_fraction": 0.5,
        "max_tokens": None,
        "evaluated_tokens": 9000,
        "through_cache": False,
        "cache_window": None,
        "cache_sinks": 0,
        "loss": 1.0,
        "perplexity": 2.7,
        "word_perplexity": 9.0,
        "bits_per_byte": 1.4,
    }
    through = {"through_cache": True}
    others: list[dict[str, Any]] = [
        {"split": "validation"},
        {"data_fingerprint": "e" * 64},
        {"data_fingerprint": "f" * 64},
        {"cache_dtype": "float32"},
        {"precision": "bfloat16"},
        {"per_document": True},
        {"stride_fraction": 0.25},
        {"stride_fraction": 1.0},
        {"max_tokens": 8000, "evaluated_tokens": 8000},
        {"max_tokens": 500, "evaluated_tokens": 500},
        through,
        through | {"cache_dtype": "int8"},
        through | {"cache_window": 64},
        through | {"cache_window": 64, "cache_sinks": 4},
        {"max_tokens": 500, "evaluated_tokens": 500, "stride_fraction": 0.25},
    ]
    records = [plain, *(plain | changes for changes in others)]
    keys = [next(iter(dashboard_figures(record, summary))) for record in records]
    assert keys[0] == "eval/local_sea_123456/test/loss"
    assert len(set(keys)) == len({record_name(record) for record in records}) == len(records)
    assert "eval/local_sea_123456@eeeeeeee/test/loss" in keys and "eval/local_sea_123456/test/max_tokens=8000/loss" in keys


def test_killed_between_its_files_an_evaluation_is_not_there(
    copied: Workplace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record stands for the whole: without its segments a study's report would leave out the noise in silence."""
    write, written = harness.runs.records.write_json, []

    def killed_after_the_first(path: Path, values: Any) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(path)
        write(path, values)

    monkeypatch.setattr(harness.runs.records, "write_json", killed_after_the_first)
    with pytest.raises(KeyboardInterrupt):
        copied.evaluate("run=mla", "extras=[]")
    assert [path.parent.name for path in written] == ["segments"]
    assert not (copied.runs / "mla" / "evaluations").exists()


def test_through_a_cache_extras_stand_beside_those_without_it_and_there_are_no_segments(
    copied: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert copied.evaluate("run=mla", "cache.dtype=int4") == 0
    said = capsys.readouterr().out
    (record,) = records(said)
    assert not (copied.runs / "mla" / "segments").exists()
    plain = record_of(copied, capsys, "run=mla")
    assert record["extras_without_cache"] == plain["extras"]
    assert set(record["extras"]) == set(plain["extras"]) - {"latents"}, "latents are the model's, whatever a cache keeps"
    copying = (evaluation["extras"]["recall"]["copying"] for evaluation in (record, plain))
    compared = list(zip(*copying, strict=True))
    assert all(through["second_loss"] != without["second_loss"] for through, without in compared)
    # After so few steps nothing is recalled: what a cache did to that says nothing.
    assert all(through["at_floor"] is without["at_floor"] for through, without in compared)
    assert all(without["at_floor"] for _, without in compared)
    line = next(line for line in said.splitlines() if line.startswith("copying in"))
    assert line.endswith("; at its floor in full precision: says nothing") and "  without it" in said


def test_the_divergence_of_a_cache_is_what_two_forward_passes_give(
    shared: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    divergences = {}
    for name in ("float32", "int8", "int4"):
        record = record_of(shared, capsys, "run=mha", f"cache.dtype={name}", "cache.through=true", "extras=[]")
        divergences[name] = record["cache_divergence"]
    assert abs(divergences["float32"]) < divergences["int4"] / 20 and divergences["int8"] < divergences["int4"] / 5
    assert record_of(shared, capsys, "run=mha")["cache_divergence"] is None


# --- through a cache -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", VARIANTS)
@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_eight_bits_are_scored_through_and_stand_beside_full_precision(
    shared: Workplace, capsys: pytest.CaptureFixture[str], run: str, dtype: str
) -> None:
    plain = record_of(shared, capsys, f"run={run}")
    assert shared.evaluate(f"run={run}", f"cache.dtype={dtype}") == 0
    said = capsys.readouterr().out
    (record,) = records(said)
    assert (plain["through_cache"], record["through_cache"]) == (False, True)
    assert record["perplexity_without_cache"] == plain["perplexity"] == plain["perplexity_without_cache"]
    assert record["perplexity"] != plain["perplexity"]
    assert record["perplexity"] == pytest.approx(plain["perplexity"], rel=0.01)
    # 2 heads of 16 and a scale for each, twice; or rank 16, its scale, and a rotated key of 8 in 16 bits.
    assert record["cache_bytes_per_token"] == {"mha": 2 * 2 * (16 + 2), "mla": 16 + 2 + 2 * 8}[run]
    assert f"a cache of {dtype}" in said and f"perplexity {plain['perplexity']:,.3f}" in said


def test_keys_by_channel_are_scored_through_and_counted_as_they_lie(
    shared: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    record = record_of(shared, capsys, "run=mha", "cache.dtype=kc4v4", "extras=[]")
    assert record["through_cache"] and 0 < record["cache_divergence"] < 0.1
    assert record["perplexity"] == pytest.approx(record["perplexity_without_cache"], rel=0.01)
    # 32 tokens of 2 heads of 16: keys one group of channels and the room of 32 in 16 bits, values 8 bytes and a scale a head.
    assert record["cache_bytes_at_context"] == 32 * (16 + 2) + 32 * 32 * 2 + 32 * 2 * (8 + 2)
    # Of a window of 6 tokens and 2 sinks the same group, which it touches, and the values of 8.
    window = record_of(shared, capsys, "run=mha", "cache.dtype=kc4v4", "cache.window=6", "cache.sinks=2", "extras=[]")
    assert window["cache_bytes_at_context"] == record["cache_bytes_at_context"] - (32 - 8) * 2 * (8 + 2)
    assert window["loss"] != record["loss"]
    with pytest.raises(UserError, match=r"^cache.dtype=kc4v4 .*: take cache.dtype=int4, as its keys are kept$"):
        shared.evaluate("run=mla", "cache.dtype=kc4v4")


def test_sixteen_bits_are_quoted_unless_asked_to_be_scored_through(
    shared: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = record_of(shared, capsys, "run=mha")
    exact = record_of(shared, capsys, "run=mha", "cache.dtype=float32", "cache.through=true")
    half = record_of(shared, capsys, "run=mha", "cache.through=true")
    assert exact["through_cache"] and exact["loss"] == pytest.approx(plain["loss"], rel=1e-6)
    assert half["through_cache"] and half["loss"] != plain["loss"]
    assert half["loss"] == pytest.approx(plain["loss"], rel=1e-3)


@pytest.mark.parametrize("run", VARIANTS)
def test_a_window_is_scored_and_its_whole_allocation_measured(
    shared: Workplace, capsys: pytest.CaptureFixture[str], run: str
) -> None:
    plain = record_of(shared, capsys, f"run={run}")
    window = record_of(shared, capsys, f"run={run}", "cache.window=6", "cache.sinks=2")
    assert (window["cache_window"], window["cache_sinks"], window["cache_context"]) == (6, 2, 32)
    assert window["cache_bytes_per_token"] == plain["cache_bytes_per_token"]
    assert plain["cache_bytes_at_context"] == 32 * plain["cache_bytes_per_token"]
    assert window["cache_bytes_at_context"] == 8 * plain["cache_bytes_per_token"]
    assert window["loss"] != plain["loss"] == window["loss_without_cache"]
    wide = record_of(shared, capsys, f"run={run}", "cache.window=32", "cache.dtype=float32")
    assert wide["loss"] == pytest.approx(plain["loss"], rel=1e-6)


def test_evaluations_through_other_caches_stand_beside_one_another(
    shared: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    kinds = [[], ["cache.dtype=int8"], ["cache.window=6"], ["cache.window=6", "cache.sinks=2"], ["cache.through=true"]]
    folder = shared.runs / "mha" / "evaluations"
    shutil.rmtree(folder, ignore_errors=True)
    for kind in kinds:
        record_of(shared, capsys, "run=mha", *kind)
    assert len(list(folder.iterdir())) == len(kinds)


def test_the_decode_path_is_said_and_changes_no_figure(shared: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    records = [
        record_of(shared, capsys, "run=mla", "cache.dtype=int8", f"attention.decode={path}") for path in ("expand", "absorbed")
    ]
    assert [record["decode"] for record in records] == ["expanded", "absorbed (torch kernel)"]
    assert records[0]["loss"] == pytest.approx(records[1]["loss"], rel=1e-5)
    with pytest.raises(UserError, match=r"attention.decode=absorbed is not a path of this variant"):
        shared.evaluate("run=mha", "attention.decode=absorbed")


# --- other text ------------------------------------------------------------------------------------------------------


def test_another_corpus_is_read_with_the_runs_own_tokenizer(shared: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_corpus(shared.folder / "other, text.txt", seed=5, lines=200)
    here = record_of(shared, capsys, "run=mla")
    there = record_of(shared, capsys, "run=mla", "dataset=local", f"dataset.path={path}", "split=train")
    assert there["data_fingerprint"] != here["data_fingerprint"]
    assert there["tokenizer_fingerprint"] == here["tokenizer_fingerprint"]
    assert there["trained_on"] == "local"
    tokenizer = Tokenizer.load(shared.runs / "mla" / "tokenizer.json")
    (prepared,) = (
        folder
        for file in shared.folder.glob("data/*/meta.json")
        if (folder := open_prepared(file.parent)).fingerprint == there["data_fingerprint"]
    )
    text = path.read_bytes()[: prepared.splits["train"].n_bytes].decode()
    assert there["evaluated_tokens"] == len(tokenizer.encode(text)) + 1  # and the end of text


@pytest.mark.parametrize("run", VARIANTS)  # plain bytes, and a BPE
def test_a_corpus_that_is_one_test_file_is_enough_to_evaluate_on(
    shared: Workplace, capsys: pytest.CaptureFixture[str], run: str
) -> None:
    path = write_corpus(shared.folder / "elsewhere" / "test.txt", seed=7, lines=50)
    record = record_of(shared, capsys, f"run={run}", "dataset=local", f"dataset.path={path}")
    assert record["evaluated_bytes"] == path.stat().st_size
    with pytest.raises(UserError, match="none for train"):
        shared.train("other", f"dataset.path={path}")


@pytest.mark.parametrize("overrides", [["split=tset"], ["stride_fraction=0"], ["device=gpu"], ["run=mha", "foo=1"]])
def test_mistakes_are_one_sentence(shared: Workplace, overrides: list[str]) -> None:
    with pytest.raises(UserError) as refused:
        shared.evaluate(*overrides)
    assert overrides[-1].partition("=")[0] in str(refused.value) and len(str(refused.value).splitlines()) == 1


def test_a_split_that_the_corpus_lacks_names_those_it_has(shared: Workplace) -> None:
    path = write_corpus(shared.folder / "no_test.txt", seed=6)
    corpus = ["dataset=local", f"dataset.path={path}", "dataset.test_fraction=0"]
    with pytest.raises(UserError, match=r"split=test is not in dataset=local; choose from .*validation"):
        shared.evaluate("run=mha", *corpus)


def test_text_is_known_by_what_it_is_wherever_it_lies_and_only_a_named_place_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = Workplace(tmp_path)
    run = place.train("run", "budget.steps=1")
    moved = place.corpus.rename(tmp_path / "moved.txt")
    assert place.evaluate("run=run", "extras=[]") == 0  # by what was prepared of it
    shutil.rmtree(place.folder / "data")
    moved.rename(place.corpus)
    with pytest.raises(UserError, match=r"data_dir=.*data holds nothing that is what .*run was trained on, .*dataset.path="):
        place.evaluate("run=run", "extras=[]")
    assert not (place.folder / "data").exists()
    place.corpus.rename(moved)
    assert place.evaluate("run=run", "extras=[]", f"dataset.path={moved}") == 0
    (record,) = (json.loads(path.read_text()) for path in (run / "evaluations").iterdir())
    assert (record["dataset"], record["data_fingerprint"]) == ("local", summary_of(run)["data_fingerprint"])
    write_corpus(moved, seed=9)
    with pytest.raises(UserError, match=r"data of dataset=local \(.*moved.txt\) is not what .*run was trained on"):
        place.evaluate("run=run", "extras=[]", f"dataset.path={moved}")
    check_config("eval", ["run=run", f"dataset.path={moved}"])


def test_runs_that_may_not_be_listed_are_not_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").mkdir()

    def refuse(self: Path) -> Any:  # as it is for anybody but root
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "iterdir", refuse)
    for overrides in ([], ["run=all"], ["run=some"]):
        with pytest.raises(UserError, match=r"runs_dir=.*runs cannot be read \(Permission denied\): make it readable"):
            eval_model.main([f"runs_dir={tmp_path / 'runs'}", *overrides])
    with pytest.raises(UserError, match=r"runs cannot be read \(Permission denied\)"):
        compare([tmp_path / "runs"])


@pytest.mark.parametrize("field", ["run", "runs_dir"])
def test_a_name_that_is_too_long_is_one_sentence(tmp_path: Path, field: str) -> None:
    with pytest.raises(UserError, match=rf"{field}=.* cannot be read \(File name too long\)"):
        eval_model.main([f"runs_dir={tmp_path}", f"{field}={'x' * 300}"])


def test_text_that_changed_since_the_training_is_not_what_a_run_is_scored_on(tmp_path: Path) -> None:
    place = Workplace(tmp_path)
    run = place.train("run")
    write_corpus(place.corpus, seed=9)
    assert place.evaluate("extras=[]") == 0
    (record,) = (json.loads(path.read_text()) for path in (run / "evaluations").iterdir())
    assert record["data_fingerprint"] == summary_of(run)["data_fingerprint"]
    with pytest.raises(UserError, match=r"data of dataset=local \(.*\) is not what .*run was trained on"):
        place.evaluate(f"dataset.path={place.corpus}")
