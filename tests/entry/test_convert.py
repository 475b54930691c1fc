"""scripts/convert.py and init_from: a run becomes another attention's, stage by stage, and training goes on from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import train_model
from harness import conversion
from harness.comparison import compare
from harness.config import load_run_config, load_train_config, setup_hash
from harness.conversion import ConversionConfig, converted_from, possible_folds
from harness.errors import UserError
from harness.session import load_trained
from modeling.attention import EXECUTION
from scripts import convert, export, generate
from tests.support.micro import STEPS, TOKENS_PER_STEP, Workplace, contents, json_lines, metrics_of, summary_of

# The source caches 2 (16 + 16) = 64 elements a token and layer.
METHODS: dict[str, tuple[list[str], int]] = {
    "transmla": (["method=transmla", "kv_lora_rank=16", "qk_rope_head_dim=8"], 24),
    "transmla, split and normed": (["method=transmla", "kv_lora_rank=16", "qk_rope_head_dim=8", "kv_latent=split",
                                    "latent_norm=rms"], 24),
    "transmla, weights": (["method=transmla", "kv_lora_rank=16", "qk_rope_head_dim=16", "fold=1", "basis=weights"], 32),
    "mha2mla": (["method=mha2mla", "kv_lora_rank=16", "qk_rope_head_dim=8"], 24),
    "exact": (["method=exact"], 64),
    "exact, one table": (["method=exact", "rope_mode=extend"], 64),
    "gqa_mean": (["method=gqa_mean", "n_kv_heads=1"], 32),
}  # fmt: skip
# Keys and values together are wider than d_model=32 in the source, so this latent is x itself.
AFTER_UP = (["method=exact", "rope_mode=after_up"], 32)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    place = Workplace(tmp_path_factory.mktemp("convert"))
    place.train("source", "budget.steps=30", "tokenizer=bpe", "tokenizer.vocab_size=300")
    for name, overrides in {
        "mla": ["attention=mla"], "learned": ["attention=mha_learned"], "normed": ["attention=mha", "attention.qk_norm=true"],
    }.items():  # fmt: skip
        place.train(name, "budget.steps=1", *overrides)
    return place


def arguments_of(place: Workplace, to: str, *options: str, run: str = "source") -> list[str]:
    return [f"run={run}", f"to={place.runs / to}", f"runs_dir={place.runs}", f"data_dir={place.folder / 'data'}",
            "device=cpu", "calibration_tokens=2048", *options]  # fmt: skip


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


@pytest.mark.parametrize(
    ("run", "options", "sentence"),
    [
        ("source", ["method=transmla", "kv_lora_rank=33", "qk_rope_head_dim=8"], "rank=33 does not fit a latent of 56"),
        ("source", ["method=transmla", "qk_rope_head_dim=8"], "method=transmla needs kv_lora_rank="),
        ("source", ["method=transmla", "kv_lora_rank=16", "qk_rope_head_dim=6"], r"choose one of \[2, 4, 8, 16\]"),
        ("source", ["method=mha2mla", "kv_lora_rank=16", "qk_rope_head_dim=6"], "choose a multiple of 4"),
        ("source", ["method=gqa_mean", "n_kv_heads=3"], "2 key/value heads do not pool into 3"),
        ("source", ["method=exact", "kv_lora_rank=4"], "kv_lora_rank=4 says nothing to method=exact"),
        ("source", ["method=gqa_mean", "n_kv_heads=1", "fold=2"], "fold=2 says nothing to method=gqa_mean"),
        ("source", ["method=svd"], "method=svd is unknown; choose transmla, mha2mla, exact or gqa_mean"),
        ("source", [], "method= is missing"),
        ("mla", ["method=exact"], "attention=mla is no MHA, GQA or MQA"),
        ("learned", ["method=exact"], "positions=learned leaves no rotation to convert"),
        ("normed", ["method=exact"], "qk_norm=true normalises keys after their projection"),
    ],
)
def test_what_does_not_convert_is_refused_and_nothing_is_written(
    place: Workplace, run: str, options: list[str], sentence: str
) -> None:
    before = contents(place.runs)
    with pytest.raises(UserError, match=sentence):
        convert.main(arguments_of(place, "refused", *options, run=run))
    assert contents(place.runs) == before


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
    assert (
        setup_hash(converted_from(source, options)) == setup_hash(load_run_config(run)) == summary_of(run)["setup_hash"]
    )
    records = [summary_of(place.runs / name) for name in ("source", "transmla")]
    assert {record["setup_hash"] for record in records} == {setup_hash(source), setup_hash(load_run_config(run))}


# --- init_from ---------------------------------------------------------------------------------------------------------


def tuned(place: Workplace, name: str, *more: str) -> list[str]:
    """A command line without the sizes, which come with the weights."""
    return [f"name={name}", "init_from=transmla", "batch_size=4", f"budget.steps={STEPS}", "optimizer.lr=1e-3",
            "dataset=local", f"dataset.path={place.corpus}", *place.places(), *more]  # fmt: skip


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


def test_a_conversion_counts_all_the_tokens_behind_the_weights(place: Workplace) -> None:
    arguments = [a for a in tuned(place, "further") if not a.startswith("init_from=")]
    assert train_model.main([*arguments, "init_from=source"]) == 0
    before, after = summary_of(place.runs / "source")["tokens"], STEPS * TOKENS_PER_STEP
    assert convert.main(arguments_of(place, "fewer", "method=gqa_mean", "n_kv_heads=1", run="further")) == 0
    assert summary_of(place.runs / "fewer")["tokens"] == before + after


@pytest.mark.parametrize(
    ("name", "architecture"),
    [("transmla", "AttentionAblationForCausalLM"), ("transmla, normed", "DeepseekV3ForCausalLM")],
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
    heading, row = table.cells()
    assert row[heading.index("tokens/s")] == ""
