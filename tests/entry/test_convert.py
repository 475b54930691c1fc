"""scripts/convert.py and init_from: a run becomes another attention's, stage by stage, and training goes on from it."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import train_model
from harness.config.compose import load_train_config
from harness.config.conversion import ConversionConfig
from harness.config.identity import setup_hash
from harness.config.run_config import load_run_config
from harness.errors import UserError
from harness.files.metrics import MetricsFile
from harness.hf.classes import misfits
from harness.report.comparison import compare
from harness.runs import conversion
from harness.runs.conversion import Stage, converted_from, possible_folds, stage_rows
from harness.runs.load import load_trained
from modeling.attention import EXECUTION
from scripts import convert, export, generate
from tests.support.micro import STEPS, TOKENS_PER_STEP, Workplace, contents, json_lines, metrics_of, summary_of, without_clocks

# The source caches 2 (16 + 16) = 64 elements a token and layer.
METHODS: dict[str, tuple[list[str], int]] = {
    "transmla": (["method=transmla", "kv_lora_rank=16", "qk_rope_head_dim=8"], 24),
    "transmla, split and normed": (
        ["method=transmla", "kv_lora_rank=16", "qk_rope_head_dim=8", "kv_latent=split", "latent_norm=rms"],
        24,
    ),
    "transmla, weights": (["method=transmla", "kv_lora_rank=16", "qk_rope_head_dim=16", "fold=1", "basis=weights"], 32),
    "mha2mla": (["method=mha2mla", "kv_lora_rank=16", "qk_rope_head_dim=8"], 24),
    "exact": (["method=exact"], 64),
    "exact, one table": (["method=exact", "rope_mode=extend"], 64),
    "gqa_mean": (["method=gqa_mean", "n_kv_heads=1"], 32),
}
# Keys and values together are wider than d_model=32 in the source, so this latent is x itself.
AFTER_UP = (["method=exact", "rope_mode=after_up"], 32)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    place = Workplace(tmp_path_factory.mktemp("convert"))
    place.train("source", "budget.steps=30", "tokenizer=bpe", "tokenizer.vocab_size=300")
    for name, overrides in {
        "mla": ["attention=mla"],
        "learned": ["attention=mha_learned"],
        "normed": ["attention=mha", "attention.qk_norm=true"],
        "windows": ["attention=swa_1_1", "model.n_layers=2", "attention.kinds.local.window=5", "tokenizer=bpe"],
        "kinds": ["attention=swa_1_1", "model.n_layers=2", "attention.kinds.local.qk_norm=true"],
        "sinks": ["attention=swa_sinks", "model.n_layers=2"],
    }.items():
        place.train(name, "budget.steps=1", *overrides)
    return place


def arguments_of(place: Workplace, to: str, *options: str, run: str = "source") -> list[str]:
    return [
        f"run={run}",
        f"to={place.runs / to}",
        f"runs_dir={place.runs}",
        f"data_dir={place.folder / 'data'}",
        "device=cpu",
        "calibration_tokens=2048",
        *options,
    ]


def converted(place: Workplace, to: str, *options: str) -> Path:
    if not (place.runs / to).exists():
        assert convert.main(arguments_of(place, to, *options)) == 0
    return place.runs / to


def stages_of(run: Path) -> list[dict[str, Any]]:
    stages: list[dict[str, Any]] = json.loads((run / "origin.json").read_text())["stages"]
    return stages


@pytest.mark.parametrize("name", [*METHODS, "exact, after_up"])
def test_a_converted_run_is_a_run_with_the_cache_that_was_asked_for(
    place: Workplace, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options, elements = (METHODS | {"exact, after_up": AFTER_UP})[name]
    run = converted(place, name.replace(", ", "-").replace(" ", "_"), *options)
    summary = summary_of(run)
    assert summary["cache_elements_per_token_per_layer"] == elements
    assert (summary["tokens"], summary["tokens_per_second"]) == (summary_of(place.runs / "source")["tokens"], None)
    stages = stages_of(run)
    assert stages[0]["stage"] == "the run" and stages[0]["kl"] == 0
    assert all(stage["relative_logit_error"] <= 1e-5 for stage in stages if stage["exact"])
    assert stages[-1]["loss"] == pytest.approx(summary["loss"], rel=1e-5)
    assert stages[-1]["cache_bytes_per_token"] == summary["cache_bytes_per_token"]
    heading = stage_rows([Stage(**stage) for stage in stages])[0]
    assert f"cache bytes/token at {summary['cache_context']} tokens" in heading
    if all(stage["exact"] for stage in stages):
        assert summary["loss"] == pytest.approx(summary_of(place.runs / "source")["loss"], rel=1e-5)
    capsys.readouterr()
    assert place.evaluate(f"run={run}", "max_tokens=500") == 0
    assert json_lines(capsys.readouterr().out)[-1]["cache_elements_per_token_per_layer"] == elements
    assert generate.main([f"run={run}", "prompt=the sea", "max_new_tokens=4", "device=cpu"]) == 0


def test_decoding_through_the_small_cache_gives_the_logits_of_the_whole_text(place: Workplace) -> None:
    for name in ("transmla", "mha2mla", "exact"):
        run = converted(place, name, *METHODS[name][0])
        trained = load_trained(
            run, device=torch.device("cpu"), precision=torch.float32, execution=EXECUTION | {"decode": "absorbed"}
        )
        tokens_BT = torch.randint(300, (1, 20), generator=torch.Generator().manual_seed(0))
        cache = trained.model.new_cache(1, 20, dtype=torch.float32, device="cpu")
        with torch.inference_mode():
            whole = trained.model(tokens_BT)[..., :300]
            steps = torch.cat([trained.model(tokens_BT[:, i : i + 1], cache) for i in range(20)], dim=1)[..., :300]
        assert float((steps - whole).norm() / whole.norm()) < 1e-5


@pytest.mark.parametrize("method", ["exact", "exact, one table", "transmla, full rank", "gqa_mean"])
def test_windows_stay_layer_by_layer_and_at_full_rank_the_model_with_them(place: Workplace, method: str) -> None:
    full = ["method=transmla", "kv_lora_rank=32", "qk_rope_head_dim=16", "fold=1"]
    options = (METHODS | {"transmla, full rank": (full, 0), "exact": (["method=exact"], 0)})[method][0]
    to = f"windows-{method.replace(', ', '-').replace(' ', '_')}"
    if not (place.runs / to).exists():
        assert convert.main(arguments_of(place, to, *options, run="windows")) == 0
    source, target = (
        load_trained(place.runs / name, device=torch.device("cpu"), precision=torch.float32, execution=dict(EXECUTION))
        for name in ("windows", to)
    )
    assert [attention.window for attention in target.model.attentions] == [5, None]
    latent = "kv_lora_rank" in target.config.attention
    assert ("attention.window=5" in misfits(target.config)) is latent, "no stock class has latents and windows"
    vocab, exact = source.model.vocab_size, all(stage["exact"] for stage in stages_of(place.runs / to))
    assert exact is (method == "exact")
    tokens_BT = torch.randint(vocab, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before, after = (each.model(tokens_BT)[..., :vocab] for each in (source, target))
        for decode in target.model.attentions[0].decode_paths:
            target.model.set_execution(decode=decode)
            cache = target.model.new_cache(2, 24, dtype=torch.float32, device="cpu")
            assert [layer.slots for layer in cache] == [5, 24]
            split = [3, 9, *[1] * 12]
            pieces = torch.cat([target.model(piece, cache) for piece in tokens_BT.split(split, dim=1)], dim=1)[..., :vocab]
            assert float((pieces - after).norm() / after.norm()) < 1e-5
    assert (float((after - before).norm() / before.norm()) < 1e-5) is exact


def test_what_no_stage_carries_over_is_refused_with_its_value(place: Workplace) -> None:
    for run, sentence in (
        ("kinds", r"layers that differ in kinds.local.qk_norm, and conversions make all of them alike but for their windows$"),
        ("sinks", r"has sink_logits=True, which no conversion carries over$"),
    ):
        with pytest.raises(UserError, match=sentence):
            convert.main(arguments_of(place, "refused", "method=exact", run=run))


def test_the_fold_is_the_one_that_validation_prefers(place: Workplace) -> None:
    origin = json.loads((converted(place, "transmla", *METHODS["transmla"][0]) / "origin.json").read_text())
    tried = {int(fold): loss for fold, loss in origin["details"]["validation_loss_by_fold"].items()}
    assert list(tried) == possible_folds(16, 8) == [2, 4, 8]
    assert tried[origin["details"]["fold"]] == min(tried.values()) == pytest.approx(origin["stages"][-1]["loss"])
    assert all(0 < kept <= 1 for kept in origin["details"]["energy_kept_held_out"])
    assert origin["details"]["calibration_tokens"] >= 2048


def test_a_stage_that_should_be_exact_and_is_not_stops_the_conversion(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from modeling.conversion import stages

    def wrong(layer: Any) -> Any:
        merged = stages.merge(layer)
        return conversion.dataclasses.replace(merged, k_rope_PD=merged.k_rope_PD * 1.01)

    monkeypatch.setattr(conversion, "merge", wrong)
    before = contents(place.runs)
    with pytest.raises(UserError, match="'merge heads' should change nothing and changes the logits by"):
        convert.main(arguments_of(place, "wrong", "method=exact"))
    assert contents(place.runs) == before


def write_weights(run: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the weights of a run's only layer in its newest checkpoint, and the sums that vouch for them."""
    folder = max((run / "checkpoints").glob("step-*"))
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    manifest = json.loads((folder / "manifest.json").read_text())
    content = (folder / "model.safetensors").read_bytes()
    manifest["model.safetensors"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_pooling_two_equal_heads_under_yarn_is_checked_to_change_nothing(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def equal(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("k_proj", "v_proj"):
            weight = tensors[f"blocks.0.attention.{name}.weight"]
            weight[16:] = weight[:16]

    run = place.train(
        "yarn", "attention=mha", "attention.rope_scaling={rope_type:yarn,factor:4.0,original_max_position_embeddings:16}"
    )
    pool = ("method=gqa_mean", "n_kv_heads=1")
    assert convert.main(arguments_of(place, "unlike", *pool, run="yarn")) == 0
    assert [stage["exact"] for stage in stages_of(place.runs / "unlike")] == [True, True, False]
    write_weights(run, equal)
    assert convert.main(arguments_of(place, "alike", *pool, run="yarn")) == 0
    assert [stage["exact"] for stage in stages_of(place.runs / "alike")] == [True, True, True]
    assert summary_of(place.runs / "alike")["cache_elements_per_token_per_layer"] == 32

    from modeling.conversion import layers

    def twice(layer: Any) -> Any:
        return layers.grouped_state(layer.with_plain_rotation())

    monkeypatch.setattr(conversion, "grouped_state", twice)
    with pytest.raises(UserError, match="'all heads, rewritten' should change nothing and changes the logits by"):
        convert.main(arguments_of(place, "wrong", *pool, run="yarn"))
    assert not (place.runs / "wrong").exists()


@pytest.mark.parametrize(
    ("method", "elements"),
    [
        (["method=transmla", "kv_lora_rank=16", "qk_rope_head_dim=8"], 24),
        (["method=mha2mla", "kv_lora_rank=16", "qk_rope_head_dim=8"], 24),
        (["method=exact"], 2 * 16 + 32),
    ],
)
def test_values_that_are_together_wider_than_the_model_convert_like_others(
    place: Workplace, method: list[str], elements: int
) -> None:
    if not (place.runs / "wide").exists():
        place.train("wide", "attention=mha", "attention.v_head_dim=24")  # 2 heads of 24 where d_model is 32
    name = f"wide-{method[0].partition('=')[2]}"
    assert convert.main(arguments_of(place, name, *method, run="wide")) == 0
    assert summary_of(place.runs / name)["cache_elements_per_token_per_layer"] == elements
    assert all(stage["relative_logit_error"] <= 1e-5 for stage in stages_of(place.runs / name) if stage["exact"])


def test_a_conversion_whose_score_no_disk_takes_is_one_sentence_and_the_same_command_finishes_it(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    options = arguments_of(place, "late", "method=gqa_mean", "n_kv_heads=1")
    with monkeypatch.context() as patched:
        patched.setattr(MetricsFile, "append", refused)
        with pytest.raises(UserError, match=r"late cannot be written \(Input/output error\); its last checkpoint, .*same"):
            convert.main(options)
    assert convert.main(options) == 0


def test_a_conversion_killed_before_its_score_is_finished_by_the_same_command(
    place: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    pool = ("method=gqa_mean", "n_kv_heads=1")
    assert convert.main(arguments_of(place, "whole", *pool)) == 0
    shutil.copytree(place.runs / "whole", place.runs / "killed")
    config = (place.runs / "killed" / "config.yaml").read_text()
    (place.runs / "killed" / "config.yaml").write_text(config.replace("name: whole", "name: killed"))
    (place.runs / "killed" / "summary.json").unlink()
    for options, sentence in {
        (
            "method=exact",
        ): r"killed holds another conversion \(method=gqa_mean, of .*source\) .*the command that made it scores",
        (*pool, "run=normed"): "holds another conversion|pooled",
        (*pool, "run=nowhere"): "is no run",
    }.items():
        with pytest.raises(UserError, match=sentence):
            convert.main(arguments_of(place, "killed", *options))
    origin = place.runs / "killed" / "origin.json"
    made = json.loads(origin.read_text())
    origin.write_text(json.dumps(made | {"checkpoint": "step-00000029"}))
    with pytest.raises(UserError, match=r"weights are others by now \(step-00000029 there, .*remove the folder, and convert"):
        convert.main(arguments_of(place, "killed", *pool))
    (place.folder / "linked").symlink_to(place.runs)  # the same source by another path
    origin.write_text(json.dumps(made | {"source": str(place.folder / "linked" / "source")}))
    weights = next((place.runs / "killed" / "checkpoints").glob("step-*/model.safetensors"))
    before = weights.stat().st_mtime_ns
    capsys.readouterr()
    assert convert.main(arguments_of(place, "killed", *pool)) == 0
    assert "killed, where it was not scored" in capsys.readouterr().out
    assert weights.stat().st_mtime_ns == before
    assert summary_of(place.runs / "killed")["loss"] == summary_of(place.runs / "whole")["loss"]
    with pytest.raises(UserError, match="exists and is no empty folder"):
        convert.main(arguments_of(place, "killed", *pool))


def test_what_killed_conversions_left_is_deleted_and_what_others_write_is_not(place: Workplace) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    here = f".tidy.partial-{platform.node()}"
    left = [f"{here}-{dead.pid}", ".tidy.partial-elsewhere-1"]  # the second has not been written to for two days
    kept = [f"{here}-1", f".tidy2.partial-{platform.node()}-{dead.pid}", ".tidy.partial-elsewhere-2"]  # process 1 is alive
    for name in (*left, *kept):
        (place.runs / name / "checkpoints").mkdir(parents=True)
        (place.runs / name / "checkpoints" / "weights").write_bytes(b"w")
    old, folder = time.time() - 2 * 86_400, place.runs / left[1]
    for path in [*sorted(folder.rglob("*"), reverse=True), folder]:
        os.utime(path, (old, old))
    assert convert.main(arguments_of(place, "tidy", "method=gqa_mean", "n_kv_heads=1")) == 0
    for name in left:
        assert not (place.runs / name).exists(), name
    for name in kept:
        assert (place.runs / name).exists(), name
        shutil.rmtree(place.runs / name)


@pytest.mark.parametrize(
    ("value", "where", "sentence"),
    [
        (math.nan, "q_proj k_proj", r"holds weights that are not finite \(blocks.0.attention.q_proj.weight\): use an earlier"),
        (1e30, "q_proj k_proj", "the logits of 'the run' are not finite, or all of them 0: nothing was written"),
        (1e30, "o_proj", "the logits of 'the run' are not finite, or all of them 0: nothing was written"),
    ],
)
def test_a_run_of_broken_weights_does_not_convert(place: Workplace, value: float, where: str, sentence: str) -> None:
    def broken(tensors: dict[str, torch.Tensor]) -> None:
        for name in where.split():
            tensors[f"blocks.0.attention.{name}.weight"].fill_(value)

    run = place.train("broken", "attention=mha", "budget.steps=1", "overwrite=true")
    write_weights(run, broken)
    for method in (["method=exact"], METHODS["transmla"][0]):
        with pytest.raises(UserError, match=sentence):
            convert.main(arguments_of(place, "of-broken", *method, run="broken"))
    if math.isnan(value):
        with pytest.raises(UserError, match=sentence):
            generate.main([f"run={run}", "prompt=the sea", "max_new_tokens=4", "device=cpu"])
    assert not (place.runs / "of-broken").exists()


def test_a_missing_package_of_the_dashboard_is_refused_before_the_conversion_and_the_remedy_works(
    place: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracked, to = tmp_path / "tracked", place.runs / "untracked"
    shutil.copytree(place.runs / "source", tracked)
    config = (tracked / "config.yaml").read_text()
    assert config.count("  name: none\n") == 1
    (tracked / "config.yaml").write_text(config.replace("  name: none\n", "  name: trackio\n"))
    monkeypatch.setitem(sys.modules, "trackio", None)  # what Python itself does to say: there is no such module
    arguments = arguments_of(place, to.name, "method=exact", run=str(tracked))
    with pytest.raises(UserError, match=r"needs the package trackio: pip install .*, or take .* tracking=none"):
        convert.main(arguments)
    assert not to.exists()
    assert convert.main([*arguments, "tracking=none"]) == 0 and summary_of(to)["loss"] > 0


def test_a_validation_split_of_other_content_is_not_what_a_conversion_is_judged_by(tmp_path: Path) -> None:
    place = Workplace(tmp_path)
    place.train("origin", "budget.steps=1", "attention=mha")
    (file,) = place.folder.glob("data/*/validation.bin")
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
    with pytest.raises(
        UserError, match=rf"validation\.bin has other content .*: copy {file.parent} again, or delete it and name"
    ):
        convert.main(arguments_of(place, "made", "method=exact", run="origin"))
    assert not (place.runs / "made").exists()
    shutil.rmtree(file.parent)
    assert convert.main(arguments_of(place, "made", "method=exact", f"dataset.path={place.corpus}", run="origin")) == 0


def test_a_run_is_not_converted_on_other_text_than_it_learned_from(tmp_path: Path) -> None:
    place = Workplace(tmp_path)
    place.train("origin", "budget.steps=1", "attention=mha")
    place.corpus.write_text(place.corpus.read_text() + "\nand one line more")
    named = f"dataset.path={place.corpus}"
    with pytest.raises(UserError, match=r"is not what .*origin was trained on; bring that data back"):
        convert.main(arguments_of(place, "other", "method=exact", named, run="origin"))
    assert convert.main(arguments_of(place, "other", "method=exact", run="origin")) == 0  # what it learned from is there
    assert summary_of(place.runs / "other")["data_fingerprint"] == summary_of(place.runs / "origin")["data_fingerprint"]


@pytest.mark.parametrize(
    ("run", "options", "sentence"),
    [
        ("source", ["method=transmla", "kv_lora_rank=33", "qk_rope_head_dim=8"], "rank=33 does not fit a latent of 56"),
        ("source", ["method=transmla", "qk_rope_head_dim=8"], "method=transmla needs kv_lora_rank, "),
        ("source", ["method=transmla", "kv_lora_rank=16", "qk_rope_head_dim=6"], r"choose one of \[2, 4, 8, 16\]"),
        ("source", ["method=mha2mla", "kv_lora_rank=16", "qk_rope_head_dim=6"], "choose a multiple of 4"),
        ("source", ["method=gqa_mean", "n_kv_heads=3"], "2 key/value heads do not pool into n_kv_heads=3"),
        ("source", ["method=exact", "kv_lora_rank=4"], "kv_lora_rank=4 says nothing to method=exact"),
        ("source", ["method=gqa_mean", "n_kv_heads=1", "fold=2"], "fold=2 says nothing to method=gqa_mean"),
        ("source", ["method=svd"], "method=svd is unknown; choose from exact, gqa_mean, mha2mla, transmla"),
        ("source", [], "method= is missing"),
        ("mla", ["method=exact"], "attention=mla is no MHA, GQA or MQA"),
        ("learned", ["method=exact"], "positions=learned leaves no rotation to convert"),
        ("normed", ["method=exact"], "qk_norm=true normalises keys after their projection"),
        ("normed", ["method=gqa_mean", "n_kv_heads=1"], "after their projection, so that projections cannot be .*pooled"),
    ],
)
def test_what_does_not_convert_is_refused_and_nothing_is_written(
    place: Workplace, run: str, options: list[str], sentence: str
) -> None:
    before = contents(place.runs)
    with pytest.raises(UserError, match=sentence):
        convert.main(arguments_of(place, "refused", *options, run=run))
    assert contents(place.runs) == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["method=gqa_mean", "n_kv_heads=1"], "exports as  transformers' Llama"),
        (
            [*METHODS["transmla"][0], "latent_norm=none"],
            "exports as  a class of our own: no stock one that we write has attention.latent_norm=none",
        ),
    ],
)
def test_what_the_result_exports_as_is_said_before_the_work(
    place: Workplace, options: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise UserError("here the work begins")

    monkeypatch.setattr("harness.runs.conversion.convert", stop)
    with pytest.raises(UserError, match="here the work begins"):
        convert.main(arguments_of(place, "said", *options))
    assert capsys.readouterr().out.startswith(said)


def test_a_target_that_exists_is_left_as_it_is(place: Workplace) -> None:
    before = contents(place.runs / "mla")
    with pytest.raises(UserError, match="exists and is no empty folder"):
        convert.main(arguments_of(place, "mla", "method=exact"))
    with pytest.raises(UserError, match="must end in one plain folder name"):
        convert.main(arguments_of(place, "a b", "method=exact"))
    assert contents(place.runs / "mla") == before


def test_two_ways_to_one_shape_are_two_setups(place: Workplace) -> None:
    source = load_run_config(place.runs / "source")
    ways = [
        converted_from(source, ConversionConfig("transmla", kv_lora_rank=16, qk_rope_head_dim=16, basis=basis))
        for basis in (None, "weights")
    ]
    assert ways[0].attention == ways[1].attention and setup_hash(ways[0]) != setup_hash(ways[1])
    run = converted(place, "transmla", *METHODS["transmla"][0])
    options = ConversionConfig("transmla", kv_lora_rank=16, qk_rope_head_dim=8, calibration_tokens=2048)
    assert setup_hash(converted_from(source, options)) == setup_hash(load_run_config(run)) == summary_of(run)["setup_hash"]
    records = [summary_of(place.runs / name) for name in ("source", "transmla")]
    assert {record["setup_hash"] for record in records} == {setup_hash(source), setup_hash(load_run_config(run))}


# --- init_from ---------------------------------------------------------------------------------------------------------


def tuned(place: Workplace, name: str, *more: str) -> list[str]:
    """A command line without the sizes, which come with the weights."""
    return [
        f"name={name}",
        "init_from=transmla",
        "batch_size=4",
        f"budget.steps={STEPS}",
        "optimizer.lr=1e-3",
        "dataset=local",
        f"dataset.path={place.corpus}",
        *place.places(),
        *more,
    ]


def test_training_goes_on_from_the_converted_weights(place: Workplace) -> None:
    source = converted(place, "transmla", *METHODS["transmla"][0])
    assert train_model.main(tuned(place, "tuned")) == 0
    run, summary = place.runs / "tuned", summary_of(place.runs / "tuned")
    first = metrics_of(run)[0]
    assert first["val/loss"] == pytest.approx(summary_of(source)["loss"], rel=1e-5)
    assert summary["loss"] != first["val/loss"]
    assert (summary["tokens"], summary["initial_tokens"]) == (STEPS * TOKENS_PER_STEP, summary_of(source)["tokens"])
    assert (run / "tokenizer.json").read_text() == (source / "tokenizer.json").read_text()
    config = load_run_config(run)
    assert config.attention == load_run_config(source).attention
    assert (config.init_from, config.init_setup) == (str(source), setup_hash(load_run_config(source)))
    assert place.evaluate(f"run={run}", "max_tokens=500") == 0


def test_weights_bring_their_corpus_unless_another_is_named_and_that_is_said(
    place: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place.train("origin", "budget.steps=1")
    short = ["init_from=origin", "batch_size=4", "budget.steps=1", "optimizer.lr=1e-3", *place.places()]
    assert train_model.main(["name=on", *short]) == 0
    before, after = summary_of(place.runs / "origin"), summary_of(place.runs / "on")
    assert (after["dataset"], after["data_fingerprint"]) == ("local", before["data_fingerprint"])
    assert f"weights     of {place.runs / 'origin'}, on its own corpus" in capsys.readouterr().out
    other = tmp_path / "other.txt"
    other.write_text("\n".join(f"the captain saw {n} storms and an island" for n in range(900)))
    assert train_model.main(["name=moved", *short, f"dataset.path={other}"]) == 0
    assert summary_of(place.runs / "moved")["data_fingerprint"] != before["data_fingerprint"]
    assert "trained on another corpus than this run's (dataset.path is" in capsys.readouterr().out
    assert load_train_config([*short, "dataset=stdlib"]).dataset.name == "stdlib"
    with pytest.raises(UserError, match=r"dataset.max_tokens=500 makes another corpus .*not followed: name the text too"):
        load_train_config([*short, "dataset.max_tokens=500"])
    capped = load_train_config([*short, "dataset.max_tokens=500", f"dataset.path={place.corpus}"])
    assert (capped.dataset.path, capped.dataset.max_tokens) == (str(place.corpus), 500)


def test_a_corpus_that_changed_since_the_weights_learned_from_it_is_refused(tmp_path: Path) -> None:
    place = Workplace(tmp_path)
    place.train("origin", "budget.steps=1")
    place.corpus.write_text(place.corpus.read_text() + "\nand one line more")
    short = ["init_from=origin", "batch_size=4", "budget.steps=1", *place.places()]
    with pytest.raises(UserError, match=r"is not what init_from=.*origin was trained on; .*dataset.path=\.\.\."):
        train_model.main(["name=named", *short, f"dataset.path={place.corpus}"])
    assert not (place.runs / "named" / "metrics.jsonl").exists()
    assert train_model.main(["name=on", *short]) == 0  # on what was prepared of it
    assert summary_of(place.runs / "on")["data_fingerprint"] == summary_of(place.runs / "origin")["data_fingerprint"]


@pytest.mark.parametrize("name", ["name=on", "name=auto"])
def test_a_run_goes_on_when_the_one_whose_weights_it_began_with_is_gone(tmp_path: Path, name: str) -> None:
    place = Workplace(tmp_path)
    place.train("origin", "tokenizer=bpe", "tokenizer.vocab_size=300", "budget.steps=2")
    command = [
        name,
        "init_from=origin",
        "batch_size=4",
        "budget.steps=4",
        "intervals.checkpoint=2",
        "intervals.evaluate=2",
        *place.places(),
    ]
    assert train_model.main(command) == 0
    (run,) = (path for path in place.runs.iterdir() if path.is_dir() and path.name != "origin")
    before = summary_of(run)
    shutil.rmtree(place.runs / "origin")
    assert train_model.main(command) == 0  # finished
    (run / "summary.json").unlink()
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    assert train_model.main(command) == 0
    assert without_clocks(summary_of(run)) == without_clocks(before)
    assert before["initial_tokens"] == 2 * TOKENS_PER_STEP
    with pytest.raises(UserError, match=r"init_from=origin is no run"):
        train_model.main([*command, "name=another"])


@pytest.mark.parametrize("content", [{"tokens": "many"}, {"tokens": -1}, {"initial_tokens": [1]}, {"tokens": None}])
def test_a_source_that_does_not_say_its_tokens_is_refused_before_a_step_is_made(
    place: Workplace, content: dict[str, Any], tmp_path: Path
) -> None:
    source = shutil.copytree(place.runs / "source", tmp_path / "odd")
    (source / "summary.json").write_text(json.dumps(summary_of(source) | content))
    sentence = r"odd/summary.json (lacks tokens|is not as it was written \((initial_)?tokens=)"
    with pytest.raises(UserError, match=sentence):
        train_model.main(["name=from-odd", f"init_from={source}", "batch_size=4", "budget.steps=1", *place.places()])
    assert not (place.runs / "from-odd" / "metrics.jsonl").exists()
    with pytest.raises(UserError, match=sentence):
        convert.main(arguments_of(place, "of-odd", "method=exact", run=str(source)))
    assert not (place.runs / "of-odd").exists()


def test_a_conversion_counts_all_the_tokens_behind_the_weights(place: Workplace) -> None:
    arguments = [a for a in tuned(place, "further") if not a.startswith("init_from=")]
    assert train_model.main([*arguments, "init_from=source"]) == 0
    before, after = summary_of(place.runs / "source")["tokens"], STEPS * TOKENS_PER_STEP
    assert convert.main(arguments_of(place, "fewer", "method=gqa_mean", "n_kv_heads=1", run="further")) == 0
    assert summary_of(place.runs / "fewer")["tokens"] == before + after


@pytest.mark.parametrize(
    ("name", "architecture"), [("transmla", "AttentionAblationForCausalLM"), ("transmla, normed", "DeepseekV3ForCausalLM")]
)
def test_what_was_converted_and_trained_on_is_exported_as_a_stock_model_where_its_latent_has_a_norm(
    place: Workplace, name: str, architecture: str, tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    options = [*METHODS["transmla"][0], *(["latent_norm=rms"] if "normed" in name else [])]
    run = converted(place, name.replace(", ", "-"), *options)
    arguments = [a for a in tuned(place, f"tuned-{run.name}") if not a.startswith("init_from=")]
    assert train_model.main([*arguments, f"init_from={run}"]) == 0
    assert export.main([f"run={place.runs / f'tuned-{run.name}'}", f"to={tmp_path / 'out'}"]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [architecture]


def test_the_weights_bring_their_tokenizer_to_another_text(place: Workplace, tmp_path: Path) -> None:
    converted(place, "transmla", *METHODS["transmla"][0])
    other = tmp_path / "other.txt"
    other.write_text("\n".join(f"the captain saw {n} storms and an island" for n in range(900)))
    arguments = [a for a in tuned(place, "elsewhere") if not a.startswith("dataset.path=")]
    assert train_model.main([*arguments, f"dataset.path={other}"]) == 0
    assert (
        summary_of(place.runs / "elsewhere")["tokenizer_fingerprint"]
        == (summary_of(place.runs / "transmla")["tokenizer_fingerprint"])
    )


def test_what_the_weights_bring_cannot_be_asked_for_otherwise(place: Workplace) -> None:
    converted(place, "transmla", *METHODS["transmla"][0])
    for extra, sentence in {
        "attention=mla": r"init_from=transmla brings its own model, attention and tokenizer: attention\.\w+ is",
        "model.n_layers=2": r"model\.n_layers is 1 there and 2 here; leave that out, or train from scratch",
        "model=small": r"brings its own model.*model\.d_model is 32 there",
    }.items():
        with pytest.raises(UserError, match=sentence):
            load_train_config(tuned(place, "other", extra))
    with pytest.raises(UserError, match=r"init_from=transml is no run .*did you mean transmla"):
        load_train_config([a.replace("init_from=transmla", "init_from=transml") for a in tuned(place, "other")])
    config = load_train_config(tuned(place, "auto", "model.dropout=0.1"))
    assert "init_from=trans" in config.name and config.model.dropout == 0.1


def test_seeds_that_start_from_seeds_are_one_setup(place: Workplace) -> None:
    first = load_train_config(tuned(place, "a", f"init_from={converted(place, 'transmla', *METHODS['transmla'][0])}"))
    second = conversion.dataclasses.replace(first, init_from="/elsewhere/transmla-seed1", seed=1, data_seed=1)
    other = conversion.dataclasses.replace(first, init_setup="000000000000")
    assert setup_hash(first) == setup_hash(second) != setup_hash(other)


def test_a_comparison_shows_runs_that_were_not_trained_without_a_speed(place: Workplace) -> None:
    run = converted(place, "transmla", *METHODS["transmla"][0])
    assert place.evaluate(f"run={run}") == 0
    table = compare([run], split="test").tables[0]
    heading, _ = table.cells()
    assert "parameters" in heading and "tokens/s" not in heading  # an empty column is left out
