"""A study's YAML, its plan and its record: what is refused, which runs follow, and what the folder keeps."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from harness.config.compose import load_train_config, options_of
from harness.config.identity import setup_hash
from harness.errors import UserError
from harness.runs.records import DeclarationRecord, read_study
from harness.study.history import additions
from harness.study.plan import (
    StudyConfig,
    StudyPlan,
    build_plan,
    check_same_study,
    load_study,
    merged,
    record_alone,
    settle_tuning_seed,
    write_record,
)
from harness.study.runner import Rates
from scripts import run_study

GOOD = """
question: which?
base: [model=tiny, dataset=stdlib, optimizer.lr=0.004]
seeds: [0, 1]
primary_seeds: [0, 1, 2]
arms:
  mha: {family: mha, overrides: [attention=mha]}
  gqa: {family: gqa, overrides: [attention=gqa]}
  mla: {family: mla, overrides: [attention=mla]}
contrasts: [[mla, gqa]]
tune: {factors: [0.5, 1, 2]}
"""


def study(folder: Path, text: str) -> StudyConfig:
    (folder / "given.yaml").write_text(text)
    return load_study("given", folder)


def plan(folder: Path, text: str = GOOD) -> StudyPlan:
    return build_plan(study(folder, text), name="given", command="command", runs_dir=folder / "runs")


WIDER = GOOD.replace(
    "contrasts:",
    """  gqa_2: {family: gqa, overrides: [attention=gqa, model.d_model=256, model.n_heads=8]}
  mla_2: {family: mla, overrides: [attention=mla, model.d_model=256, model.n_heads=8]}
trends: {mla - gqa: {of: [[mla, gqa], [mla_2, gqa_2]]}}
contrasts:""",
)


def test_an_arm_without_a_sweep_may_say_its_own_rate(tmp_path: Path) -> None:
    untuned = GOOD.replace("tune: {factors: [0.5, 1, 2]}\n", "")
    own = plan(tmp_path, untuned.replace("[attention=gqa]", "[attention=gqa, optimizer.lr=0.002]"))
    assert own.shared_lr is None and plan(tmp_path, untuned).shared_lr == 0.004
    rates = own.untuned_rates(own.arms)
    assert rates == {"mha": 0.004, "gqa": 0.002, "mla": 0.004}
    runs = own.main_runs(rates, ["mla", "gqa"])
    assert [spec.name for spec in runs[:2]] == ["mla-lr0.004-seed0", "gqa-lr0.002-seed0"]
    write_record(own, chosen_lr={}, specs=runs, sweep=[], failures=[])
    assert read_study(own.folder)["shared_lr"] is None


def test_a_trend_knows_the_size_of_its_arms_and_gives_them_the_seeds_of_declared_ones(tmp_path: Path) -> None:
    planned = plan(tmp_path, WIDER)
    assert planned.config.seeds_of("mla_2") == [0, 1, 2] and planned.config.seeds_of("mha") == [0, 1]
    write_record(planned, chosen_lr={}, specs=[], sweep=[], failures=[])
    expected = {"over": "model.d_model", "of": [("mla", "gqa"), ("mla_2", "gqa_2")], "at": [128, 256]}
    assert read_study(planned.folder)["trends"] == {"mla - gqa": expected}


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        ("[mla_2, gqa_2]]", "[mla_2, gqa_3]]", "trends.mla - gqa of study=given names gqa_3, no arm of it"),
        (", [mla_2, gqa_2]]", "]", "must be two pairs [a, b] or more, with every arm in one of them"),
        ("[mla_2, gqa_2]]", "[mla_2, gqa]]", "must be two pairs [a, b] or more, with every arm in one of them"),
        ("[mla, gqa], [mla_2, gqa_2]]", "[mla, gqa_2], [mla_2, gqa]]", "model.d_model is 128 in mla and 256 in gqa_2"),
        ("gqa_2]]}", "gqa_2]], over: model.width}", "trends.mla - gqa.over=model.width is no field of a run's configuration"),
        ("gqa_2]]}", "gqa_2]], over: model.max_seq_len}", "is 256 in all pairs: a trend needs two sizes at least"),
    ],
)
def test_a_trend_that_says_nothing_is_refused(before: str, after: str, sentence: str, tmp_path: Path) -> None:
    assert WIDER.count(before) == 1
    with pytest.raises(UserError, match=re.escape(sentence)):
        plan(tmp_path, WIDER.replace(before, after))


@pytest.mark.parametrize("name", options_of("study"))
def test_every_shipped_study_composes_builds_and_says_what_it_is(name: str, tmp_path: Path) -> None:
    shipped = build_plan(load_study(name), name=name, command="", runs_dir=tmp_path)
    first = (Path(run_study.ROOT) / "configs" / "study" / f"{name}.yaml").read_text().splitlines()[0]
    assert first.startswith(f"# python scripts/run_study.py study={name}")
    assert len(shipped.arms) >= 4
    assert {a for pair in shipped.config.contrasts for a in pair} <= shipped.arms.keys()
    assert len({setup_hash(arm.config) for arm in shipped.arms.values()}) == len(shipped.arms), "two arms are one"


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        ("[[mla, gqa]]", "[[mla, gqq]]", "contrasts of study=given names gqq, no arm of it; did you mean gqa?"),
        ("[[mla, gqa]]", "[[mla, mla]]", "must name two different arms"),
        ("[[mla, gqa]]", "[[mla, gqa], [gqa, mla]]", "contrasts of study=given must compare two arms once only"),
        (
            "question: which?",
            "question: which?\nstaircase: [mla, gqa, mla]",
            "staircase of study=given must compare two arms once only",
        ),
        ("seeds: [0, 1]", "seeds: [0, 0]", "seeds=[0, 0] of study=given must be different whole numbers"),
        ("factors: [0.5, 1, 2]", "factors: [0.5, 1]", "must be three or more, positive and rising"),
        ("question: which?", "questoin: which?", "questoin is not a field of the configuration; did you mean question?"),
        ("attention=gqa", "attention=gqqa", "attention=gqqa does not exist; did you mean gqa?"),
        (
            "[attention=gqa]",
            "[attention=gqa, optimizer.lr=0.1]",
            "the arms say different learning rates [0.004, 0.1], and a sweep tries the same ones",
        ),
        ("question: which?", "question: which?\nevaluate: [foo=1]", "foo is not a field of the configuration"),
        ("question: which?", "question: which?\nevaluate: [max_tokens=0]", "max_tokens=0 must be 1 or more"),
        *(
            (
                "question: which?",
                f"question: which?\nevaluate: [{otherwise}]",
                f"evaluate=['{otherwise}']: a study judges its runs on the test split of their own corpus, without a cache",
            )
            for otherwise in ("split=validation", "cache.dtype=int8", "cache.window=8", "cache.through=true", "dataset=stdlib")
        ),
        (
            "question: which?",
            "question: which?\nmetric: repeats_gain\nevaluate: ['extras=[beyond]']",
            "metric=repeats_gain is measured by repeats: name it in the extras of evaluate=['extras=[beyond]']",
        ),
        ("question: which?", "question: which?\ndecode_contexts: [64, 0]", "decode_contexts[1]=0 must be 1 or more"),
        ("question: which?", "question: which?\ndecode_batch_sizes: [-1]", "decode_batch_sizes[0]=-1 must be 1 or more"),
        (
            "question: which?",
            "question: which?\nmatch: [{quantity: params, multiple_of: 0}]",
            "multiple_of=0 must be 1 or more",
        ),
        ("question: which?", "question: which?\nmatch: [{quantity: params, tolerance: -1}]", "tolerance=-1 must be 0 or more"),
        ("question: which?", "question: which?\nmargin: 0", "margin=0 must be 1e-30 or more"),
        ("factors: [0.5, 1, 2]", "factors: [0.5, 1, 2], extensions: -1", "tune.extensions=-1 must be 0 or more"),
    ],
)
def test_a_wrong_study_is_refused_in_one_sentence(tmp_path: Path, before: str, after: str, sentence: str) -> None:
    assert before in GOOD
    with pytest.raises(UserError) as caught:
        plan(tmp_path, GOOD.replace(before, after, 1))
    assert sentence in str(caught.value)


def test_arms_share_a_list_of_overrides_by_an_anchor(tmp_path: Path) -> None:
    shared = GOOD.replace("[attention=gqa]", "[&wide [model.d_model=256, model.n_heads=8], attention=gqa]")
    arms = study(tmp_path, shared.replace("[attention=mla]", "[attention=mla, *wide]")).arms
    assert arms["gqa"].overrides == ["model.d_model=256", "model.n_heads=8", "attention=gqa"]
    assert arms["mla"].overrides == ["attention=mla", "model.d_model=256", "model.n_heads=8"]
    for wrong in ("arms: 1", "arms: {gqa: 1}", "arms: {gqa: {family: gqa, overrides: 1}}"):
        with pytest.raises(UserError, match=r"^arms.*=1 must be "):
            study(tmp_path, f"question: which?\nbase: []\nseeds: [0]\n{wrong}")


def test_a_study_that_does_not_exist_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"study=kv_bugdet does not exist; did you mean kv_budget\?"):
        load_study("kv_bugdet")


def test_arms_of_declared_contrasts_get_the_larger_number_of_seeds_and_runs_come_seed_by_seed(tmp_path: Path) -> None:
    runs = plan(tmp_path).main_runs(dict.fromkeys(("mha", "gqa", "mla"), 0.004), ["mha", "gqa", "mla"])
    assert [(run.seed, run.arm) for run in runs] == [
        (0, "mha"),
        (0, "gqa"),
        (0, "mla"),
        (1, "mha"),
        (1, "gqa"),
        (1, "mla"),
        (2, "gqa"),
        (2, "mla"),
    ]


def test_the_hash_of_a_planned_run_is_that_of_the_run_its_overrides_make(tmp_path: Path) -> None:
    planned = plan(tmp_path)
    for spec in (planned.spec("mla", 0.00312345, 2), planned.spec("gqa", 0.004, 0, 100_000)):
        config = load_train_config(planned.overrides(spec))
        assert setup_hash(config) == spec.setup_hash
        assert (config.name, config.seed, config.data_seed) == (spec.name, spec.seed, spec.seed)
        assert config.optimizer.lr == spec.lr
        assert config.tracking.group == spec.arm
    assert planned.spec("mla", 0.00312345, 2).name == "mla-lr0.00312-seed2"
    assert planned.spec("gqa", 0.004, 0, 100_000).name == "gqa-lr0.004-tokens100000-seed0"


def test_a_folder_takes_more_seeds_and_arms_but_no_other_setup(tmp_path: Path) -> None:
    planned = plan(tmp_path)
    write_record(planned, chosen_lr={}, specs=[], sweep=[], failures=[])
    check_same_study(planned)
    check_same_study(plan(tmp_path, GOOD.replace("seeds: [0, 1]", "seeds: [0, 1, 5]", 1)))
    fewer = "\n".join(line for line in GOOD.splitlines() if not line.startswith("  mha:"))
    check_same_study(plan(tmp_path, fewer))
    with pytest.raises(UserError, match=r"the first is mla: attention=mla there, attention=mla_plain here\): choose"):
        check_same_study(plan(tmp_path, GOOD.replace("attention=mla]", "attention=mla_plain]")))
    with pytest.raises(UserError, match="the base differs"):
        check_same_study(plan(tmp_path, GOOD.replace("model=tiny", "model=mini")))


def test_the_same_study_of_another_corpus_takes_a_folder_of_its_own(tmp_path: Path) -> None:
    write_record(plan(tmp_path), chosen_lr={}, specs=[], sweep=[], failures=[])
    config = study(tmp_path, GOOD)
    config.base += ["dataset=linux"]  # as the command line adds it
    with pytest.raises(UserError, match=r"another setup \(3 of its arms changed, .*the base differs\): choose another name="):
        check_same_study(build_plan(config, name="given", command="", runs_dir=tmp_path / "runs"))
    other = build_plan(config, name="given_linux", command="", runs_dir=tmp_path / "runs")
    check_same_study(other)
    assert {arm.config.dataset.name for arm in other.arms.values()} == {"linux"}
    overrides = other.overrides(other.spec("mla", 0.004, 0))
    assert [one for one in overrides if one.startswith("dataset")] == ["dataset=linux"]
    write_record(other, chosen_lr={}, specs=[], sweep=[], failures=[])
    assert read_study(other.folder)["base"][-1] == "dataset=linux" and "linux" not in str(read_study(tmp_path / "runs/given"))


def test_rates_are_tuned_on_a_seed_that_is_not_scored(tmp_path: Path) -> None:
    planned = plan(tmp_path)
    settle_tuning_seed(planned)
    assert planned.tuning_seed == 1000
    with pytest.raises(UserError, match=r"tune\.seed=2 of given is one of the seeds that are scored"):
        settle_tuning_seed(plan(tmp_path, GOOD.replace("[0.5, 1, 2]", "[0.5, 1, 2], seed: 2")))
    settle_tuning_seed(other := plan(tmp_path, GOOD.replace("[0.5, 1, 2]", "[0.5, 1, 2], seed: 3")))
    assert other.tuning_seed == 3
    with pytest.raises(UserError, match=r"tune\.seed=1000 of given is one"):
        settle_tuning_seed(plan(tmp_path, GOOD.replace("seeds: [0, 1]", "seeds: [0, 1000]", 1)))


def test_a_sweep_that_was_begun_on_a_scored_seed_goes_on_with_it(tmp_path: Path) -> None:
    planned = plan(tmp_path)
    write_record(planned, chosen_lr={}, specs=[], sweep=[planned.spec("mla", 0.004, 0, 100_000)], failures=[])
    settle_tuning_seed(planned)
    assert planned.tuning_seed == 0


def keep(planned: StudyPlan, arms: Sequence[str] | None = None, **tuned: float) -> list[DeclarationRecord]:
    """What a command writes down before it trains, and the history that it leaves."""
    arms = [*(arms or planned.arms)]
    rates = Rates(tuned or planned.untuned_rates(arms))
    command = run_study.Command(planned, arms, "lr" if tuned else "none", run_study.StudyOptions(), [], {"mha": [0, 1]})
    run_study.keep(command, rates, planned.main_runs(rates.chosen, arms), [])
    return read_study(planned.folder)["history"]


def test_the_record_keeps_what_was_declared_and_how_many_runs_had_ended(tmp_path: Path) -> None:
    (declared,) = keep(plan(tmp_path))
    assert declared["results"] == 0 and declared["contrasts"] == [("mla", "gqa")] and declared["margin"] is None
    assert declared["arms"] == {"mha": [0, 1], "gqa": [0, 1, 2], "mla": [0, 1, 2]}
    assert keep(plan(tmp_path)) == [declared], "the same again says nothing new"
    run = tmp_path / "runs" / "given" / "gqa-lr0.004-seed0"
    run.mkdir()
    (run / "summary.json").write_text("{}")
    changed = GOOD.replace("[[mla, gqa]]", "[[mla, gqa], [mla, mha]]").replace("question", "margin: 0.002\nquestion")
    first, later = keep(plan(tmp_path, changed))
    assert first == declared and (later["results"], later["margin"]) == (1, 0.002)
    added = additions(read_study(tmp_path / "runs" / "given"))
    assert (added.contrasts, added.seeds, added.margin, added.known) == ([("mla", "mha")], {"mha": [2]}, True, True)


def test_a_way_of_choosing_rates_that_was_changed_after_a_result_is_told(tmp_path: Path) -> None:
    (declared,) = keep(plan(tmp_path), ["gqa"], gqa=0.005)
    assert declared["rates"] == {"mha": None, "gqa": 0.005, "mla": None}
    run = tmp_path / "runs" / "given" / "gqa-lr0.005-seed0"
    run.mkdir()
    (run / "summary.json").write_text("{}")
    keep(plan(tmp_path), ["mla"], mla=0.003)
    assert additions(read_study(tmp_path / "runs" / "given")).rates == []
    keep(plan(tmp_path), ["mha"])
    assert additions(read_study(tmp_path / "runs" / "given")).rates == ["mha"]
    assert keep(plan(tmp_path))[-1]["results"] == 1
    assert additions(read_study(tmp_path / "runs" / "given")).reason("mla", "gqa") == (
        "the learning rate of mla and gqa was changed after the first result"
    )


def test_results_of_runs_that_a_study_no_longer_names_have_been_seen_all_the_same(tmp_path: Path) -> None:
    keep(plan(tmp_path))
    run = tmp_path / "runs" / "given" / "gqa-lr0.004-seed0"
    run.mkdir()
    (run / "summary.json").write_text("{}")
    changed = GOOD.replace("[[mla, gqa]]", "[[mla, gqa], [mla, mha]]")
    assert keep(plan(tmp_path, changed))[-1]["results"] == 1
    assert additions(read_study(tmp_path / "runs" / "given")).contrasts == [("mla", "mha")]
    # The record names none of these runs now, and has none that ended: a command later they have been seen as before.
    renamed = changed.replace("gqa", "other").replace("=other", "=gqa")
    keep(plan(tmp_path, renamed.replace("question", "margin: 0.1\nquestion")))
    assert [entry["results"] for entry in keep(plan(tmp_path, renamed))] == [0, 1, 1, 1]
    assert additions(read_study(tmp_path / "runs" / "given")).arms == ["other"]


def test_a_trend_is_no_other_one_after_a_result(tmp_path: Path) -> None:
    keep(plan(tmp_path, WIDER))
    other = plan(tmp_path, WIDER.replace("[mla_2, gqa_2]]", "[gqa_2, mla_2]]"))
    check_same_study(other)  # nothing has ended
    run = tmp_path / "runs" / "given" / "gqa-lr0.004-seed0"
    run.mkdir()
    (run / "summary.json").write_text("{}")
    check_same_study(plan(tmp_path, WIDER))
    with pytest.raises(UserError, match=r"trends\.mla - gqa is another trend there.*give this one a name of its own"):
        check_same_study(other)
    keep(plan(tmp_path, WIDER.replace("[mla, gqa]]", "[mla, mha]]", 1)))  # a history with a result, and then it is gone
    shutil.rmtree(run)
    keep(plan(tmp_path, WIDER.replace("trends:", "#")))  # nor where it is dropped first
    check_same_study(plan(tmp_path, WIDER))
    with pytest.raises(UserError, match="is another trend there"):
        check_same_study(other)


def test_two_commands_that_end_at_once_rewrite_the_record_one_after_the_other(tmp_path: Path) -> None:
    planned, entered = plan(tmp_path), threading.Event()

    def other() -> None:
        with record_alone(planned):
            entered.set()

    thread = threading.Thread(target=other)
    with record_alone(planned):
        thread.start()
        assert not entered.wait(0.3)
    assert entered.wait(10)
    thread.join()


def test_of_two_overrides_of_one_field_the_last_holds() -> None:
    assert merged(["model=tiny", "seed=1", "model=mini"]) == ["model=mini", "seed=1"]


def test_a_dry_run_prints_every_run_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["study=demo", "dry_run=true", f"runs_dir={tmp_path / 'runs'}", "tracking=none"]
    assert run_study.main(arguments) == 0
    output = capsys.readouterr().out
    for arm in ("mha", "gqa", "mqa", "mla"):
        assert f"{arm}-lr0.005-seed2" in output
        assert f"{arm}-lr0.00125-tokens100000-seed1000" in output
    assert output.count("  cache bytes/token at 256 tokens  ") == 2
    assert re.search(
        r"^24 of 24 runs to do, [\d,]+ tokens, \d+ at a time; how long is known once a run has ended$", output, re.M
    )
    assert json.loads(output.splitlines()[-1])["seconds"] is None
    assert not (tmp_path / "runs").exists()


def test_a_sweep_file_does_the_same_arms_and_seeds(tmp_path: Path) -> None:
    import yaml

    file = tmp_path / "sweep.yaml"
    arguments = ["study=demo", f"sweep_file={file}", f"runs_dir={tmp_path / 'runs'}", "tracking=none"]
    assert run_study.main(arguments) == 0
    sweep = yaml.safe_load(file.read_text())
    assert sweep["parameters"] == {"arms": {"values": ["mha", "gqa", "mqa", "mla"]}, "seeds": {"values": [0, 1, 2]}}
    assert sweep["program"] == "scripts/run_study.py"
    assert {"study=demo", "tune=none", "tracking=none", "${args_no_hyphens}"} <= set(sweep["command"])


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("tune=yes", "tune=yes is unknown"),
        ("arms=mha,mlaa", r"mlaa is no arm of demo; did you mean mla\?"),
        ("seeds=0,x", "seeds=0,x must be whole numbers of at most 18 digits, separated by commas"),
        ("seeds=0,0", "seeds=0,0 must be different whole numbers from 0 on"),
        ("seeds=-1", "seeds=-1 must be different whole numbers from 0 on"),
        ("jobs=0", "jobs=0 must be 1 or more"),
        ("name=../outside", "name=../outside must be one plain folder name"),
        ("tune=stored", "holds no tuned rate of mha, gqa, mqa, mla; sweep them with tune=lr"),
        ("modle=tiny", r"modle is not a field of the configuration; did you mean model\?"),
    ],
)
def test_a_wrong_command_is_refused_in_one_sentence_before_the_data(tmp_path: Path, argument: str, sentence: str) -> None:
    data = tmp_path / "data"
    with pytest.raises(UserError, match=sentence):
        run_study.main(["study=demo", f"runs_dir={tmp_path / 'runs'}", f"data_dir={data}", "tracking=none", argument])
    assert not data.exists()


STARTED = """
question: which?
base: [model=tiny, dataset=stdlib, tokenizer=bytes, optimizer.lr=0.004]
seeds: [0, 1]
arms:
  tuned: {family: mla, starts_from: small, overrides: [budget.tokens=50000, optimizer.lr=0.0005]}
  small: {family: mla, starts_from: gqa, convert: {method: transmla, kv_lora_rank: 32, qk_rope_head_dim: 16}}
  svd: {family: mla, starts_from: gqa, convert: {method: transmla, kv_lora_rank: 32, qk_rope_head_dim: 16, basis: weights}}
  gqa: {family: gqa, overrides: [attention=gqa]}
contrasts: [[tuned, gqa]]
"""


def test_arms_start_from_the_run_of_their_own_seed_at_a_rate_of_their_own(tmp_path: Path) -> None:
    planned = plan(tmp_path, STARTED)
    assert list(planned.arms) == ["tuned", "small", "svd", "gqa"] and planned.shared_lr == 0.004
    rates = planned.untuned_rates(planned.arms)
    assert rates == {"tuned": 0.0005, "small": 0.004, "svd": 0.004, "gqa": 0.004}
    (tuned,) = (spec for spec in planned.main_runs(rates, ["tuned"]) if spec.seed == 1)
    small, gqa = planned.spec("small", 0.004, 1), planned.spec("gqa", 0.004, 1)
    assert tuned.source == small.name == "small-lr0.004-seed1" and small.tokens == 0
    assert small.source == gqa.name == "gqa-lr0.004-seed1" and gqa.source is None
    assert f"init_from={planned.folder / small.name}" in planned.overrides(tuned)
    assert planned.conversion(tuned) is None and planned.conversion(gqa) is None
    arguments = planned.conversion(small)
    assert arguments is not None
    assert {"method=transmla", "kv_lora_rank=32", f"run={planned.folder / gqa.name}", f"to={planned.folder / small.name}"} <= (
        set(arguments)
    )
    assert planned.arms["small"].quantities == planned.arms["svd"].quantities == planned.arms["tuned"].quantities
    assert planned.arms["small"].quantities["kv_bytes"] == 4 * 2 * (32 + 16)
    assert len({setup_hash(arm.config) for arm in planned.arms.values()}) == 4
    assert tuned.setup_hash == planned.spec("tuned", 0.0005, 0).setup_hash


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        ("starts_from: small", "starts_from: smal", "arms.tuned.starts_from of study=given names smal, no arm of it"),
        ("starts_from: gqa, convert", "starts_from: tuned, convert", "start from one another: tuned from small from tuned"),
        ("starts_from: gqa, convert", "convert", "arm small of study=given is converted, not trained: it needs starts_from"),
        ("method: transmla, kv_lora_rank: 32", "method: transmla", "method=transmla needs kv_lora_rank, "),
        ("method: transmla", "methd: transmla", "arms.small.convert.methd is not a field"),
        ("contrasts", "tune: {factors: [0.5, 1, 2]}\ncontrasts", "sweeps learning rates, and some of its arms start from"),
        (
            "seeds: [0, 1]",
            "seeds: [0, 1]\nprimary_seeds: [0, 1, 2]",
            "starts from small, which has no run of seed 2: leave primary",
        ),
        ("[budget.tokens=50000", "[model.n_layers=2", "brings its own model, attention and tokenizer: model.n_layers is 4"),
    ],
)
def test_a_wrong_start_is_refused_in_one_sentence(tmp_path: Path, before: str, after: str, sentence: str) -> None:
    assert before in STARTED
    with pytest.raises(UserError) as caught:
        plan(tmp_path, STARTED.replace(before, after, 1))
    assert sentence in str(caught.value)
