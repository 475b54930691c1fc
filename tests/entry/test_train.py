"""train_model.py: what a run leaves behind, when it is left alone, refused or continued, and that it repeats."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import train_model
from harness.config.build import model_shapes
from harness.config.compose import load_train_config, options_of
from harness.config.run_config import load_run_config
from harness.data import open_prepared, prepare
from harness.data.prepared import _sha256, fingerprint_of
from harness.entry.cli import run_hydra
from harness.errors import UserError
from harness.runs.session import Session
from harness.tracking import check_tracking
from harness.training.optimizer import build_optimizer, choose_recipe
from harness.training.schedule import Schedule
from tests.support.forks import Forks
from tests.support.micro import (
    PROMISED,
    SIZE,
    STEPS,
    TOKENS_PER_STEP,
    Workplace,
    contents,
    metrics_of,
    records,
    summary_of,
    without_clocks,
    write_corpus,
)

EVERY_STEP = ["intervals.log=1", "intervals.evaluate=2", "intervals.checkpoint=2"]


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    return Workplace(tmp_path)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """One finished run, `done`, that tests read and leave as it is."""
    place = Workplace(tmp_path_factory.mktemp("shared"))
    place.train("done", *EVERY_STEP)
    return place


# --- what a run does -------------------------------------------------------------------------------------------------


def test_on_its_way_to_its_first_step_a_run_does_each_thing_once(shared: Workplace, tmp_path: Path) -> None:
    once = (prepare, open_prepared, Schedule.__init__, choose_recipe, build_optimizer, check_tracking, model_shapes)
    names = {each.__code__: each.__qualname__ for each in (*once, _sha256)}
    called = Counter[str]()

    def count(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code in names:
            called[names[frame.f_code]] += 1

    sys.setprofile(count)
    try:
        shared.train("counted", f"runs_dir={tmp_path}")  # its data are prepared
    finally:
        sys.setprofile(None)
    assert called == Counter(names.values()) + Counter({"_sha256": 8})  # three counts of each of three splits


def damage(file: Path) -> None:
    """Other content of the same size; of a tokenizer, two tokens with each other's ids."""
    content = file.read_bytes()
    if file.name == "tokenizer.json":
        assert content.count(b'"a": ') == content.count(b'"b": ') == 1
        content = content.replace(b'"a": ', b'"_": ').replace(b'"b": ', b'"a": ').replace(b'"_": ', b'"b": ')
    else:
        content = bytes([content[0] ^ 1]) + content[1:]
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["train.bin", "validation.bin", "tokenizer.json"])
def test_damaged_data_are_prepared_again_or_refused_before_anything_is_written(
    place: Workplace, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("tokenizer=bpe", "tokenizer.vocab_size=300")
    place.train("whole", *options)
    (file,) = place.folder.glob(f"data/*/{name}")
    whole = contents(file.parent)
    shutil.copytree(file.parent, copy := place.folder / "copy")
    damage(file)
    damage(copy / name)
    before = contents(place.folder)
    with pytest.raises(UserError, match=rf"{copy / name} (has other|is not the) .*: copy {copy} again"):
        place.train("refused", f"dataset.path={copy}", *options)
    assert contents(place.folder) == before
    with pytest.raises(UserError, match=rf"{name} (has other|is not the) .*: delete {file.parent} to have it prepared"):
        opened = open_prepared(file.parent)
        (opened.tokenizer, [opened.verified(split) for split in opened.splits])  # as a process asks that is not the first
    capsys.readouterr()
    assert summary_of(place.train("again", *options))["loss"] == summary_of(place.runs / "whole")["loss"]
    assert re.search(rf"{name} .* meta\.json says\. Preparing it again", capsys.readouterr().err)
    assert contents(file.parent) == whole


# --- what a run leaves behind ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (["attention=mla", "cache.dtype=kc4v4"], "serves as key and value at once: take cache.dtype=int4"),
        (["attention=gqa", "attention.n_kv_heads=3"], "n_heads=2"),
        (["tokenizer=pretrained", "tokenizer.path=/nowhere"], "tokenizer.path=/nowhere does not exist"),
        (["tokenizer=pretrained", "tokenizer.path=no--name"], "tokenizer.path=no--name does not exist"),
        (["optimizer=muon", "compile=on", "capture=on"], "capture=on"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_the_configuration_decides_is_refused_before_anything_is_written(
    place: Workplace, wrong: list[str], sentence: str
) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)):
        place.train("refused", *wrong)
    assert contents(place.folder).keys() == {"sea.txt"} and not place.runs.exists()


def test_the_summary_has_every_promised_key_and_right_values(shared: Workplace) -> None:
    summary = summary_of(shared.runs / "done")
    assert summary.keys() >= PROMISED
    known = {
        "name": "done",
        "attention": "mha",
        "model": "tiny",
        "dataset": "local",
        "seed": 0,
        "steps": STEPS,
        "tokens": STEPS * TOKENS_PER_STEP,
        "split": "validation",
        "cache_dtype": "bfloat16",
        "cache_elements_per_token_per_layer": 2 * 2 * 16,
        "cache_bytes_per_token": 2 * 2 * 16 * 2,
        # embedding (257 padded to 320), q k v o, three MLP matrices, three norms
        "parameters": 320 * 32 + 4 * 32 * 32 + 3 * 32 * 64 + 3 * 32,
    }
    assert {key: summary[key] for key in known} == known
    assert summary["perplexity"] == pytest.approx(math.exp(summary["loss"]))
    assert summary["tokens_per_second"] > 0 and summary["seconds"] > 0
    assert summary["commit"] is None or re.fullmatch(r"[0-9a-f]{40}(\+changes)?", summary["commit"])
    assert (shared.runs / "done" / "changes.diff").is_file() == str(summary["commit"]).endswith("+changes")


def test_a_run_holds_its_resolved_configuration(shared: Workplace) -> None:
    run = shared.runs / "done"
    assert "${" not in (run / "config.yaml").read_text()
    assert load_run_config(run) == load_train_config(shared.overrides("name=done", *EVERY_STEP))
    assert {path.name for path in run.iterdir()} - {"changes.diff"} == {  # which only a changed checkout leaves
        "config.yaml",
        "metrics.jsonl",
        "summary.json",
        "checkpoints",
        ".checkpoints-written",
    }


def test_the_first_line_of_the_metrics_is_of_the_untrained_model_and_sizes_are_in_the_summary(shared: Workplace) -> None:
    first, summary = metrics_of(shared.runs / "done")[0], summary_of(shared.runs / "done")
    assert set(first) == {"step", "tokens", "val/loss", "val/perplexity", "val/bits_per_byte"}
    assert (first["step"], first["tokens"]) == (0, 0)
    assert summary["parameters_by_block"]["total"] == summary["parameters"]
    assert summary["cache_bytes_per_token"] == 2 * 2 * 16 * 2  # keys and values of two heads of 16 in two bytes
    assert summary["training_flops_per_token"] > 6 * (summary["parameters"] - 320 * 32)
    assert first["val/loss"] == pytest.approx(math.log(257), rel=0.05)  # an untrained model knows nothing


def test_every_line_of_the_metrics_carries_step_and_tokens_and_the_steps_come_in_order(shared: Workplace) -> None:
    lines = metrics_of(shared.runs / "done")
    assert all(line["tokens"] == line["step"] * TOKENS_PER_STEP for line in lines)
    trained = [line for line in lines if "train/loss" in line]
    scored = [line for line in lines if "val/loss" in line]
    assert [line["step"] for line in trained] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in scored] == [0, 2, 4, 6]
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
    assert all(
        line.keys() >= {"train/lr", "train/grad_norm", "speed/tokens_per_second", "memory/peak_bytes"} for line in trained
    )
    assert all(line.keys() >= {"val/perplexity", "val/bits_per_byte"} for line in scored)
    assert scored[-1]["val/loss"] == summary_of(shared.runs / "done")["loss"]


def test_intervals_thin_the_metrics_but_start_and_end_always_stand(place: Workplace) -> None:
    lines = metrics_of(place.train("run", "intervals.log=4", "intervals.evaluate=5"))
    assert [line["step"] for line in lines if "train/loss" in line] == [4, 6]
    assert [line["step"] for line in lines if "val/loss" in line] == [0, 5, 6]


def test_a_run_says_what_it_will_do_before_it_does_it(place: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    place.train("run", "attention=mla")
    said = capsys.readouterr().out
    head, _, rest = said.partition("step 0: validation loss")
    for words in (
        "dataset     local",
        "parameters  ",
        "KV cache    48 bytes per token in bfloat16",
        "attention   mla",
        f"budget      {STEPS} steps of {TOKENS_PER_STEP} tokens",
    ):
        assert words in head
    assert records(rest) == [summary_of(place.runs / "run")]
    assert rest.rstrip().endswith("}")


def test_cache_sizes_are_quoted_in_cache_dtype_whatever_trains(place: Workplace) -> None:
    summary = summary_of(place.train("run", "cache.dtype=float32", "precision=bfloat16", "budget.steps=1"))
    assert (summary["cache_dtype"], summary["cache_bytes_per_token"]) == ("float32", 2 * 2 * 16 * 4)
    assert summary["precision"] == "bfloat16"


def test_a_budget_in_tokens_buys_whole_steps(place: Workplace) -> None:
    summary = summary_of(place.train("run", "budget.steps=null", f"budget.tokens={3 * TOKENS_PER_STEP - 1}"))
    assert (summary["steps"], summary["tokens"]) == (2, 2 * TOKENS_PER_STEP)


# --- the same name again ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [[], ["attention.backend=reference", "intervals.log=3", "compile=off"]])
def test_a_finished_run_is_left_as_it_is_and_says_so(
    shared: Workplace, more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = shared.runs / "done"
    before = contents(run)
    shared.train("done", *EVERY_STEP, *more)
    said = capsys.readouterr().out
    assert "done is finished" in said and "overwrite=true" in said and "name=" in said
    assert records(said) == [summary_of(run)]
    assert contents(run) == before


def test_a_finished_run_whose_text_has_changed_is_refused_and_with_the_text_back_it_is_finished(
    place: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    run = place.train("run", "budget.steps=1")
    text, before = place.corpus.read_bytes(), contents(run)
    place.corpus.write_bytes(text + b"\nand one line more")
    with pytest.raises(UserError, match=r"data of dataset=local is not what .*run was trained on; .*overwrite=true"):
        place.train("run", "budget.steps=1")
    place.corpus.write_bytes(text)
    place.train("run", "budget.steps=1")
    capsys.readouterr()
    place.corpus.unlink()  # nothing to compare with, and nothing that another run could learn from either
    place.train("run", "budget.steps=1")
    said = capsys.readouterr()
    assert "run is finished" in said.out
    assert "cannot be compared with what it was trained on (dataset.path=" in said.err
    assert contents(run) == before


@pytest.mark.parametrize("change", ["seed=1", "optimizer.lr=0.01", "attention=mqa", "budget.steps=7", "dataset.split_seed=1"])
def test_another_configuration_under_the_same_name_is_refused_by_field(shared: Workplace, change: str) -> None:
    before = contents(shared.runs)
    field = {"attention=mqa": "attention.name"}.get(change, change.partition("=")[0])
    with pytest.raises(UserError, match=rf"another configuration.*{field} is .*name=.*overwrite=true"):
        shared.train("done", change)
    assert contents(shared.runs) == before


def test_overwrite_deletes_the_old_run_and_trains_the_new_one(place: Workplace) -> None:
    run = place.train("run", *EVERY_STEP)
    (run / "evaluations").mkdir()
    place.train("run", "overwrite=true", "attention=mla", "budget.steps=3")
    assert summary_of(run)["attention"] == "mla"
    assert not (run / "evaluations").exists()
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"best", "step-00000003"}
    assert [path.name for path in place.runs.glob("[!.]*")] == ["run"] and not list(place.runs.glob("*.overwritten"))


MISTAKES = ["optimizer.lr=-1", "dataset.path=/nowhere.txt", "model.max_seq_len=1000000", "attention.backend=sdpa_cudnn"]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_overwrite_deletes_nothing_for_a_run_that_cannot_be_trained(place: Workplace, mistake: str) -> None:
    before = contents(place.train("run"))
    with pytest.raises(UserError, match=mistake.partition("=")[0]):
        place.train("run", "overwrite=true", mistake)
    assert contents(place.runs / "run") == before


def test_an_old_run_comes_back_when_the_one_that_overwrites_it_cannot_start(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever goes wrong, up to the first evaluation: here the memory is not enough for it."""
    before = contents(place.train("run"))

    def no_memory(self: Session) -> None:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(Session, "evaluate", no_memory)
        with pytest.raises(MemoryError):
            place.train("run", "overwrite=true", "attention=mla")
    assert contents(place.runs / "run") == before
    assert not list(place.runs.glob("*.overwritten"))


def test_a_command_killed_while_it_overwrites_loses_the_old_run_only_to_the_next_one_that_trains(place: Workplace) -> None:
    run = place.train("run")
    aside = place.runs / ".run.overwritten"
    run.rename(aside)  # killed here: the new run's folder has a configuration and nothing else
    run.mkdir()
    shutil.copy(aside / "config.yaml", run)
    with pytest.raises(UserError, match="sdpa_cudnn"):
        place.train("run", "overwrite=true", "attention.backend=sdpa_cudnn")
    assert summary_of(run)["attention"] == "mha" and not aside.exists()


def test_a_second_process_on_the_same_run_is_refused_and_a_dead_ones_lock_is_gone(place: Workplace) -> None:
    code = (
        "import sys, time; from pathlib import Path; from harness.runs.folder import lock_run\n"
        "with lock_run(Path(sys.argv[1])): print('locked', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(place.runs / "run")]
    with subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match=r"another process is training .*run: wait for its end, or choose another"):
            place.train("run")
        assert not (place.runs / "run").exists()
        holder.kill()
    assert summary_of(place.train("run"))["steps"] == STEPS


def test_a_kill_between_two_writes_of_the_claim_leaves_the_name_free(place: Workplace) -> None:
    (place.runs / "run").mkdir(parents=True)
    (place.runs / "run" / "config.yaml.tmp").write_text("half")
    assert summary_of(place.train("run"))["steps"] == STEPS


def test_checkpoints_without_metrics_are_a_run_that_another_seed_does_not_take_over(place: Workplace) -> None:
    run = place.train("run")
    for name in ("metrics.jsonl", "summary.json"):
        (run / name).unlink()
    before = contents(run)
    with pytest.raises(UserError, match=r"another configuration.*seed is 0 there and 1 here"):
        place.train("run", "seed=1")
    assert contents(run) == before


@pytest.mark.parametrize(
    "mistake",
    [
        "dataset.path=/nowhere.txt",
        "dataset.path=",
        "optimizer.lr=0",
        "optimizer.betas=[0.9]",
        "dataset.max_tokens=0",
        "dataset.validation_fraction=0",
        "model.max_seq_len=1000000",
        "schedule.warmup_fraction=1",
        "tokenizer.vocab_size=9",
        "attention.n_kv_heads=3",
        "model.mlp=gelu",
        "attention.v_head_dim=0",
        "data_dir=/dev/null",
        "runs_dir=/dev/null",
        "device=mps" if not torch.backends.mps.is_available() else "device=tpu",
    ],
)
def test_what_cannot_be_trained_is_one_sentence_and_leaves_no_run(place: Workplace, mistake: str) -> None:
    with pytest.raises(UserError) as refused:
        place.train("run", mistake)
    assert len(str(refused.value).splitlines()) == 1
    assert mistake.partition("=")[0].rpartition(".")[2] in str(refused.value)
    assert not place.runs.exists()


def test_a_name_is_free_as_long_as_nothing_has_been_trained_under_it(place: Workplace) -> None:
    (place.runs / "run").mkdir(parents=True)
    (place.runs / "run" / "config.yaml").write_text("of a command that failed before its first step")
    assert summary_of(place.train("run"))["steps"] == STEPS


def test_a_folder_that_is_no_run_is_not_touched(place: Workplace) -> None:
    (place.runs / "run").mkdir(parents=True)
    (place.runs / "run" / "thesis.txt").write_text("years of work")
    for overwrite in ("false", "true"):
        with pytest.raises(UserError, match="is no run"):
            place.train("run", f"overwrite={overwrite}")
    assert contents(place.runs) == {"run/thesis.txt": b"years of work"}


# --- seeds -----------------------------------------------------------------------------------------------------------


def losses(run: Path) -> list[float]:
    return [line[key] for line in metrics_of(run) for key in ("train/loss", "val/loss") if key in line]


def test_the_same_seed_gives_the_same_run_and_another_seed_another(shared: Workplace) -> None:
    again = shared.train("again", *EVERY_STEP)
    other = shared.train("other", "seed=1", *EVERY_STEP)
    assert losses(again) == losses(shared.runs / "done")
    assert not set(losses(other)) & set(losses(again))


def test_data_seed_alone_changes_the_order_of_the_text_and_not_the_initial_values(shared: Workplace) -> None:
    reordered = losses(shared.train("reordered", "data_seed=1", *EVERY_STEP))
    plain = losses(shared.runs / "done")
    assert reordered[0] == plain[0]
    assert not set(reordered[1:]) & set(plain[1:])


@pytest.fixture
def seen_in_training() -> Iterator[list[torch.Tensor]]:
    """The tokens that go through any embedding in training mode."""
    seen: list[torch.Tensor] = []

    def look(module: nn.Module, inputs: Any) -> None:
        if isinstance(module, nn.Embedding) and module.training:
            seen.append(inputs[0].clone())

    handle = nn.modules.module.register_module_forward_pre_hook(look)
    yield seen
    handle.remove()


def test_all_variants_see_the_same_batches_in_the_same_order(place: Workplace, seen_in_training: list[torch.Tensor]) -> None:
    batches: dict[str, torch.Tensor] = {}
    for variant, micro_batch in zip(options_of("attention"), itertools.cycle((1, 2, 4)), strict=False):
        options = (f"attention={variant}", f"micro_batch_size={micro_batch}", "budget.steps=3")
        place.train(variant, *options, "model.n_layers=4")  # as many as the longest pattern has
        batches[variant] = torch.cat(seen_in_training)
        seen_in_training.clear()
    first = batches.pop("mha")
    assert first.shape == (3 * 4, 32)
    assert batches and all(torch.equal(first, other) for other in batches.values())


# --- continuing ------------------------------------------------------------------------------------------------------


def test_a_run_that_lacks_only_its_summary_gets_it_without_training(place: Workplace) -> None:
    run = place.train("run")
    before = contents(run)
    summary = without_clocks(summary_of(run))
    (run / "summary.json").unlink()
    place.train("run")
    assert without_clocks(summary_of(run)) == summary
    after = contents(run)
    assert {name for name in before if before[name] != after[name]} <= {"summary.json"}


def test_a_run_is_not_continued_on_other_text(place: Workplace) -> None:
    run = place.train("run", "tokenizer=bpe", "tokenizer.vocab_size=300")
    (run / "summary.json").unlink()
    before = contents(run)
    write_corpus(place.corpus, seed=1)
    with pytest.raises(UserError, match=r"dataset=local is not what .* was trained on; .*overwrite=true"):
        place.train("run", "tokenizer=bpe", "tokenizer.vocab_size=300")
    assert contents(run) == before


def test_a_run_whose_fingerprint_is_of_tokens_alone_goes_on_with_the_same_tokens(place: Workplace) -> None:
    specification = json.loads(
        (place.train("made", "tokenizer=bpe", "tokenizer.vocab_size=300") / "tokenizer.json").read_text()
    )
    file = place.folder / "tokenizer.json"
    file.write_text(json.dumps(specification | {"normalizer": {"type": "Lowercase"}}))
    given = ["tokenizer=pretrained", f"tokenizer.path={file}"]
    config = load_train_config(place.overrides(*given))
    data = prepare(config.dataset, config.tokenizer, Path(config.data_dir))
    older = fingerprint_of(data.meta["splits"], data.meta["tokenizer"]["sha256"], with_counts=False)
    (data.folder / "meta.json").write_text(json.dumps(data.meta | {"fingerprint": older}))
    run = place.train("run", *given)
    assert summary_of(run)["data_fingerprint"] == older != data.fingerprint
    shutil.rmtree(data.folder)
    place.train("run", *given)  # finished, and the text is prepared anew
    place.train("started", *given, f"init_from={run}")
    (run / "summary.json").unlink()
    place.train("run", *given)
    assert summary_of(run)["data_fingerprint"] == data.fingerprint
    assert place.evaluate(f"run={run}", f"dataset.path={place.corpus}") == 0


def test_a_run_whose_checkpoints_are_all_damaged_says_so_and_keeps_them(place: Workplace) -> None:
    run = place.train("run")
    (run / "summary.json").unlink()
    (run / "checkpoints" / f"step-{STEPS:08}" / "model.safetensors").write_bytes(b"half")
    before = contents(run)
    with pytest.raises(UserError, match=r"damaged.*overwrite=true"):
        place.train("run")
    assert contents(run) == before


# --- as a command ----------------------------------------------------------------------------------------------------


def test_the_command_works_from_another_folder_with_paths_relative_to_it(tmp_path: Path, forks: Forks) -> None:
    elsewhere = tmp_path / "else where"
    write_corpus(elsewhere / "my text, (old)=1.txt")
    options = [*SIZE, "budget.steps=2", "tokenizer=bytes", "tracking=none", "device=cpu"]
    places = ["runs_dir=my runs", "data_dir=my data"]
    corpus = ["dataset=local", "dataset.path=my text, (old)=1.txt"]
    result = forks.run("train_model.py", *corpus, *options, *places, folder=elsewhere)
    assert result.status == 0, result.errors
    (summary,) = records(result.output)
    assert summary == summary_of(elsewhere / "my runs" / summary["name"])
    assert {path.name for path in elsewhere.iterdir()} == {"my runs", "my data", "my text, (old)=1.txt"}

    runs = [f"runs_dir={elsewhere / 'my runs'}", f"data_dir={elsewhere / 'my data'}", "tracking=none"]
    result = forks.run("eval_model.py", "split=validation", *runs, folder=tmp_path)
    assert result.status == 0, result.errors
    assert records(result.output)[0]["loss"] == summary["loss"]


@pytest.mark.parametrize("script", ["train_model.py", "eval_model.py"])
def test_a_mistake_is_one_line_on_stderr_and_status_2(script: str, tmp_path: Path, forks: Forks) -> None:
    result = forks.run(script, "device=gpu", f"runs_dir={tmp_path / 'runs'}", folder=tmp_path)
    assert (result.status, result.output) == (2, "")
    assert result.errors.startswith("error: device=gpu is unknown") and len(result.errors.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_gives_each_run_a_process_of_its_own_and_a_failing_one_does_not_stop_the_rest(
    place: Workplace, forks: Forks
) -> None:
    corpus = place.folder / "a, b (c)=d" / "e f.txt"  # text with commas is no list of choices
    corpus.parent.mkdir()
    shutil.copy(place.corpus, corpus)
    options = [f"dataset.path={corpus}", "dataset.max_tokens=5000", "budget.steps=1"]
    failing = load_train_config(place.overrides("attention=mha", *options)).name
    (place.runs / failing).mkdir(parents=True)
    (place.runs / failing / "notes.txt").write_text("this name is taken")

    overrides = place.overrides("attention=mha,mla", *options)
    result = forks.run("train_model.py", *overrides[:1], "-m", *overrides[1:], folder=place.folder)
    assert result.status == 1
    assert "is no run" in result.errors
    assert re.search(r"^error: 1 of the runs failed: .*attention=mha .*\(status 2\)$", result.errors, re.MULTILINE)
    (summary,) = records(result.output)
    assert summary["attention"] == "mla"
    assert len(re.findall(r"^\$ .*train_model.py .*attention=m", result.output, re.MULTILINE)) == 2
    (meta,) = place.folder.glob("data/*/meta.json")
    assert '"max_tokens": 5000' in meta.read_text()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["-m", "attention=mha,mlaa"], "attention=mlaa does not exist; did you mean mla?"),
        (["-m", "attention=glob(m*a)", "optimizer.lr=0.1,fast"], "optimizer.lr=fast must be a finite number"),
        (["-m", "attention=mla,mha", "attention.kv_lora_rank=8"], "attention.kv_lora_rank is not a field"),
        (
            ["-m", "optimizer.lr=interval(0.1,1)"],
            "optimizer.lr=interval(0.1,1) has no end of values: name some, as optimizer.lr=",
        ),
        (["-m", "mla"], "mla cannot be read as key=value (missing EQUAL at '<EOF>')"),
        (["-m", "attention=mha,mla", "--cfg", "job"], "-m and --cfg cannot stand together; leave one out"),
        (["--cfg", "job", "attention=mlaa"], "attention=mlaa does not exist; did you mean mla?"),
    ],
)
def test_a_mistake_in_one_of_several_jobs_starts_none(
    arguments: list[str], sentence: str, place: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train_model.py", *arguments, *place.places()])
    with pytest.raises(SystemExit) as stopped:
        run_hydra("train_model.py", "train", train_model.main, description=None)
    said = capsys.readouterr()
    assert (stopped.value.code, said.out) == (2, "")
    assert said.err.startswith(f"error: {sentence}") and len(said.err.splitlines()) == 1
    assert not place.runs.exists()


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("--cfg job attention=mla dataset=local dataset.max_tokens=7", ["kv_lora_rank: ", "max_tokens: 7\n"]),
        ("--cfg job dataset=mqar", ["tokenizer:\n  name: bytes\n"]),
        ("dataset=mqar seed=3 --cfg job", ["tokenizer:\n  name: bytes\n", "seed: 3\n"]),
    ],
)
def test_cfg_shows_the_configuration_and_trains_nothing(line: str, shown: list[str], tmp_path: Path, forks: Forks) -> None:
    said = forks.run("train_model.py", *line.split(), folder=tmp_path)
    assert said.status == 0 and all(text in said.output for text in shown)
    assert list(tmp_path.iterdir()) == []
