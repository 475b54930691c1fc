"""A run that somebody else made, at every command that takes one: what its files say is data and leads nowhere."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import train_model
from harness.config.run_config import load_run_config
from harness.data import Tokenizer
from harness.errors import UserError
from scripts import benchmark_decode, compare_runs, convert, export, generate, kv_calculator, report
from tests.entry.test_convert import write_weights
from tests.files.test_untrusted import peak_megabytes
from tests.study.test_runner import micro_plan
from tests.study.test_runner import run as run_study
from tests.support.micro import Workplace, contents
from tests.support.small_study import forked_runs

SECRET = "s3cret-of-this-machine"
INTERPOLATION = "${oc.env:A_SECRET}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    place = Workplace(tmp_path_factory.mktemp("sent"))
    place.train("sent", "attention=gqa", "tokenizer=bpe", "tokenizer.vocab_size=300", "budget.steps=1")
    return place


@pytest.fixture
def place(trained: Workplace, tmp_path: Path) -> Workplace:
    """A place of its own with the corpus, the prepared data and the run."""
    place = Workplace(tmp_path / "here")
    for name in ("data", "runs"):
        shutil.copytree(trained.folder / name, place.folder / name)
    change(place.runs / "sent", {"dataset.path": str(place.corpus)})
    return place


def change(run: Path, fields: dict[str, Any]) -> None:
    """Fields of a run's config.yaml, by dotted path."""
    container = yaml.safe_load((run / "config.yaml").read_text())
    for path, value in fields.items():
        *groups, last = path.split(".")
        here = container
        for group in groups:
            here = here[group]
        here[last] = value
    (run / "config.yaml").write_text(yaml.safe_dump(container))


def starts(place: Workplace) -> None:
    train_model.main(["name=on", "init_from=sent", "batch_size=4", "budget.steps=1", *place.places()])


def continues(place: Workplace) -> None:
    (place.runs / "sent" / "summary.json").unlink()
    train_model.main(
        place.overrides("name=sent", "attention=gqa", "tokenizer=bpe", "tokenizer.vocab_size=300", "budget.steps=1")
    )


def evaluates(place: Workplace) -> None:
    place.evaluate("run=sent", "max_tokens=200", "extras=[]")


def generates(place: Workplace) -> None:
    generate.main(["run=sent", f"runs_dir={place.runs}", "device=cpu", "max_new_tokens=3"])


def converts(place: Workplace) -> None:
    convert.main(
        [
            "run=sent",
            f"to={place.runs / 'converted'}",
            "method=gqa_mean",
            "n_kv_heads=1",
            f"runs_dir={place.runs}",
            f"data_dir={place.folder / 'data'}",
            "device=cpu",
        ]
    )


def exports(place: Workplace) -> None:
    export.main(["run=sent", f"to={place.folder / 'exported'}", f"runs_dir={place.runs}"])


def compares(place: Workplace) -> None:
    compare_runs.main(["sent", f"runs_dir={place.runs}", f"out={place.folder / 'compared'}", "tracking=none"])


def calculates(place: Workplace) -> None:
    kv_calculator.main(["run=sent", f"runs_dir={place.runs}"])


def times(place: Workplace) -> None:
    benchmark_decode.main(
        [
            "run=sent",
            f"runs_dir={place.runs}",
            f"out={place.folder / 'decode'}",
            "device=cpu",
            "contexts=8",
            "memory_budget_gib=0.25",
            "batch_sizes=1",
            "steps=2",
            "rounds=1",
            "step=eager",
            "peers=false",
        ]
    )


def reports(place: Workplace) -> None:
    folder = place.runs / "study"
    arms = {"family": "gqa", "overrides": [], "level": None, "reference": True, "setup_hash": "0", "match": []}
    run = {"arm": "gqa", "lr": 0.01, "seed": 0, "tokens": 128, "budget": None, "name": "sent"}
    shutil.copytree(place.runs / "sent", folder / "sent")
    (folder / "study.json").write_text(
        json.dumps(
            {
                "name": "study",
                "question": "?",
                "command": "x",
                "metric": "bits_per_byte",
                "base": [],
                "contrasts": [],
                "staircase": [],
                "arms": {"gqa": arms},
                "shared_lr": 0.01,
                "chosen_lr": {},
                "runs": [run],
                "sweep": [],
                "failures": [],
            }
        )
    )
    report.main(["name=study", f"runs_dir={place.runs}"])


def studies(place: Workplace) -> None:
    plan = micro_plan(place, "study", tokens=128)
    (spec, _) = plan.main_runs({"mha": 0.01, "mqa": 0.01}, plan.arms)
    shutil.copytree(place.runs / "sent", plan.folder / spec.name)
    (plan.folder / spec.name / "summary.json").unlink()
    with forked_runs():
        failures = run_study(place, plan, [spec])
    if failures:
        (plan.folder / "failures.json").write_text(str(failures))
        raise UserError(failures[0]["error"])


# What each command makes of a run whose text is sound. One that needs more than a run is refused for another reason.
COMMANDS: dict[Callable[[Workplace], None], str | None] = {
    starts: None,
    continues: None,
    evaluates: None,
    generates: None,
    converts: None,
    exports: None,
    compares: None,
    calculates: None,
    times: None,
    reports: "no run .*evaluated|test",
    studies: "exists with another configuration",
}
LOOKS_AT_NO_CONFIGURATION = (compares,)


def outcome(command: Callable[[Workplace], None], place: Workplace) -> str:
    """The sentence that it is refused with, "" where it is not."""
    if command is exports and importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    try:
        command(place)
    except UserError as error:
        return str(error)
    return ""


def assert_kept(place: Workplace, said: str) -> None:
    assert SECRET not in said
    for name, content in contents(place.folder).items():
        assert SECRET.encode() not in content and SECRET not in name, name


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("field", ["attention.name", "dataset.name"])
def test_an_interpolation_in_a_sent_run_is_refused_by_every_command(
    field: str,
    command: Callable[[Workplace], None],
    place: Workplace,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("A_SECRET", SECRET)
    change(place.runs / "sent", {field: INTERPOLATION})
    sentence = outcome(command, place)
    if command not in LOOKS_AT_NO_CONFIGURATION:
        assert f"config.yaml: {field} holds an interpolation" in sentence and "write the value" in sentence
    assert_kept(place, sentence + "".join(capfd.readouterr()))


@pytest.mark.parametrize("command", COMMANDS)
def test_an_interpolation_in_free_text_of_a_sent_run_stays_text_at_every_command(
    command: Callable[[Workplace], None], place: Workplace, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("A_SECRET", SECRET)
    free = ("tracking.notes", "runs_dir", "data_dir", "dataset.path")
    if command in (continues, studies):  # there the corpus is named, and a run of another one is another run
        free = free[:-1]
    change(place.runs / "sent", dict.fromkeys(free, f"/nowhere/{INTERPOLATION}"))
    sentence, expected = outcome(command, place), COMMANDS[command]
    assert (sentence == "") == (expected is None), sentence
    assert_kept(place, sentence + "".join(capfd.readouterr()))
    for config in place.runs.glob("*/config.yaml"):
        load_run_config(config.parent)


# --- where its paths lead --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [starts, evaluates, converts])
def test_a_path_of_a_sent_run_is_not_followed(command: Callable[[Workplace], None], place: Workplace) -> None:
    private = place.corpus.rename(place.folder / "private.txt")  # the very text, so that no fingerprint stops it
    change(place.runs / "sent", {"dataset.path": str(private), "data_dir": str(place.folder / "filled")})
    shutil.rmtree(place.folder / "data")
    sentence = outcome(command, place)
    assert "the path in a run's config.yaml" in sentence and "dataset.path=" in sentence and "data_dir=" in sentence
    assert not (place.folder / "filled").exists() and not (place.folder / "data").exists()


@pytest.mark.parametrize("command", [starts, evaluates, converts])
def test_ones_own_run_needs_no_word_where_its_data_is_prepared(command: Callable[[Workplace], None], place: Workplace) -> None:
    place.corpus.unlink()
    change(place.runs / "sent", {"dataset.path": "/nowhere/at/all", "data_dir": "/nowhere/else"})
    assert outcome(command, place) == ""


@pytest.mark.parametrize("command", [starts, evaluates, converts])
def test_prepared_data_of_other_tokens_than_the_runs_is_not_taken(
    command: Callable[[Workplace], None], place: Workplace
) -> None:
    """Somebody who knows a fingerprint cannot have the data read in other tokens."""
    other = Workplace(place.folder / "other").train("other", "budget.steps=1")
    fingerprint = json.loads((other / "summary.json").read_text())["data_fingerprint"]
    shutil.copytree(other.parents[1] / "data", place.folder / "data", dirs_exist_ok=True)
    file = place.runs / "sent" / "summary.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"data_fingerprint": fingerprint}))
    assert "is not followed" in outcome(command, place)


# --- what few bytes of it cost ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [starts, evaluates, generates, converts, exports])
@pytest.mark.parametrize("sizes", [{"model.n_layers": 256}, {"model.d_model": 2**18}, {"model.vocab_size": 2**24}])
def test_a_sent_run_costs_no_more_memory_than_its_weights_are_large(
    sizes: dict[str, int], command: Callable[[Workplace], None], place: Workplace
) -> None:
    change(place.runs / "sent", sizes)
    before = peak_megabytes()
    sentence = outcome(command, place)
    assert re.search(r"describes [\d,]+ parameters and its weights, .*, are [\d,]+ bytes", sentence), sentence
    assert peak_megabytes() - before < 300


@pytest.mark.parametrize("command", [starts, evaluates, generates, converts, exports])
def test_positions_that_take_more_memory_than_is_left_are_refused(
    command: Callable[[Workplace], None], place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.config.build._free_memory", lambda: 2**31)
    change(place.runs / "sent", {"model.max_seq_len": 2**24})
    before = peak_megabytes()
    sentence = outcome(command, place)
    if command is starts:  # a window of its own corpus is shorter than that
        assert "one window" in sentence or "max_seq_len" in sentence, sentence
    else:
        assert "takes 5 GB and this machine has 2 GB of memory left: choose smaller sizes" in sentence, sentence
    assert peak_megabytes() - before < 300


@pytest.mark.parametrize("command", [starts, evaluates, generates, converts, exports, times, calculates])
@pytest.mark.parametrize("sizes", [{"model.max_seq_len": 2**26}, {"model.n_layers": 10**9}, {"attention.v_head_dim": 2**40}])
def test_sizes_beyond_anything_in_a_sent_run_are_refused_by_name(
    sizes: dict[str, int], command: Callable[[Workplace], None], place: Workplace
) -> None:
    change(place.runs / "sent", sizes)
    ((field, value),) = sizes.items()
    assert f"{field}={value} is beyond anything that can be built" in outcome(command, place)


@pytest.mark.parametrize("command", [starts, evaluates, generates, converts, exports])
@pytest.mark.parametrize("value", [math.nan, 1e30])
def test_weights_of_a_sent_run_that_are_no_weights_are_one_sentence(
    value: float, command: Callable[[Workplace], None], place: Workplace
) -> None:
    def broken(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("q_proj", "k_proj"):
            tensors[f"blocks.0.attention.{name}.weight"].fill_(value)

    write_weights(place.runs / "sent", broken)
    assert re.search("not finite|is nan|by nan", outcome(command, place))


# --- its tokenizer ---------------------------------------------------------------------------------------------------

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
TWICE = [{"Sequence": {"id": "A", "type_id": 0}}] * 2


def replace(pattern: str, content: str, kind: str = "String") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ({"normalizer": {"type": "Sequence", "normalizers": [replace("a", "aa")] * 40}}, "more than 32 times as long"),
        ({"normalizer": {"type": "Sequence", "normalizers": [replace("[ж]", "жж", "Regex")] * 40}}, "32 times as long"),
        (
            {
                "normalizer": {
                    "type": "Sequence",
                    "normalizers": [{"type": "Sequence", "normalizers": [replace("", "x", "Regex")] * 20}] * 2,
                }
            },
            "more than 32 times as long",
        ),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [BYTE_LEVEL] * 40}}, "more than 32 times as long"),
        ({"decoder": {"type": "Sequence", "decoders": [replace("a", "aa")] * 40}}, "more than 32 times as long"),
        ({"normalizer": replace(" ", "x" * 60_000)}, "makes a short text too long"),
        ({"normalizer": {"type": "Sequence", "normalizers": [replace("a", "b")] * 5_000}}, "more steps"),
        (
            {"post_processor": {"type": "TemplateProcessing", "single": TWICE, "pair": TWICE, "special_tokens": {}}},
            "repeats the text",
        ),
    ],
)
def test_a_tokenizer_that_makes_a_short_text_long_is_refused_before_it_is_used(
    part: dict[str, Any], reason: str, trained: Workplace, tmp_path: Path
) -> None:
    specification = json.loads((trained.runs / "sent" / "tokenizer.json").read_text())
    # What is added is taken through the normalizer already as the file is loaded.
    token = {
        "id": 299,
        "content": "aжa",
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": True,
        "special": False,
    }
    specification["added_tokens"] = [*specification["added_tokens"], token]
    (tmp_path / "tokenizer.json").write_text(json.dumps(specification | part))
    before = peak_megabytes()
    with pytest.raises(UserError, match=reason):
        Tokenizer.load(tmp_path)
    assert peak_megabytes() - before < 100


@pytest.mark.parametrize(
    "part",
    [
        {
            "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace(" ", "▁")]},
            "decoder": {"type": "Sequence", "decoders": [replace("▁", " "), {"type": "ByteFallback"}, {"type": "Fuse"}]},
        },
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": kind} for kind in ("NFKD", "Lowercase", "StripAccents")]}},
        {"normalizer": replace(" {2,}", " ", "Regex"), "pre_tokenizer": BYTE_LEVEL},
    ],
)
def test_what_published_tokenizers_do_is_taken(part: dict[str, Any], trained: Workplace, tmp_path: Path) -> None:
    specification = json.loads((trained.runs / "sent" / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(specification | part))
    assert Tokenizer.load(tmp_path).encode("the sea")
