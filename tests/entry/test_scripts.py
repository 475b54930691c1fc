"""The command lines in scripts/: generate, check_attention, compare_runs, prepare_data."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.config.build import build_model
from harness.config.compose import load_train_config
from harness.config.places import ROOT
from harness.errors import UserError
from harness.evaluation.model_facts import model_facts
from modeling.attention import MECHANISMS, gqa
from modeling.attention.contract import CHECKS
from modeling.attention.mla import MultiheadLatentAttention
from scripts import check_attention, compare_runs, generate, prepare_data
from tests.support.forks import Forks
from tests.support.micro import SIZE, Workplace, contents, records, summary_of


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """Two finished runs that have learned a little; `mla`, the newer one, with a BPE."""
    place = Workplace(tmp_path_factory.mktemp("shared"))
    place.train("mha", "budget.steps=30")
    place.train("mla", "budget.steps=30", "attention=mla", "tokenizer=bpe", "tokenizer.vocab_size=300")
    return place


# --- what the system refuses -----------------------------------------------------------------------------------------

CAPABILITIES = "-dac_override,-dac_read_search"  # by which permissions do not hold back the superuser


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Starts commands as somebody whom permissions hold back."""
    without = [] if os.geteuid() else ["setpriv", f"--bounding-set={CAPABILITIES}", f"--inh-caps={CAPABILITIES}"]
    if without and (not shutil.which(without[0]) or subprocess.run([*without, "true"], capture_output=True).returncode):
        pytest.skip("needs setpriv, or a user whom permissions hold back")
    forks = Forks(tmp_path_factory.mktemp("held"), held=without)
    yield forks
    forks.close()


@pytest.mark.parametrize(
    "line",
    [
        "scripts/sync_wandb.py runs_dir=closed",
        "scripts/show_runs.py runs_dir=closed",
        "scripts/report.py runs_dir=closed",
        "train_model.py runs_dir=closed tracking=none",
        "train_model.py runs_dir=runs init_from=closed tracking=none",
        "scripts/convert.py run=runs/mha to=closed/new method=exact",
        "scripts/kv_calculator.py --config closed/config.json",
        "scripts/import_hf.py source=closed/model to=runs/new",
    ],
)
def test_a_folder_that_may_not_be_entered_is_one_sentence(shared: Workplace, held: Forks, line: str) -> None:
    if "show_runs" in line:
        pytest.importorskip("trackio")
    closed = shared.folder / "closed"
    closed.mkdir(exist_ok=True, mode=0)
    name, *options = line.split()
    done = held.run(name, *options, folder=shared.folder)
    assert done.status == 2, done.errors
    said = done.errors.splitlines()[-1]
    assert "Traceback" not in done.errors and said.startswith("error: ") and "Permission denied" in said
    assert "closed" in said


@pytest.mark.parametrize("name", ["meta.json", "tokenizer.json", "train.bin", "test.words.npy"])
def test_prepared_data_that_may_not_be_read_are_not_damaged_and_stay(tmp_path: Path, held: Forks, name: str) -> None:
    place = Workplace(tmp_path)
    text = [f"dataset.path={place.corpus}", f"data_dir={tmp_path / 'data'}", "tokenizer=bpe", "tokenizer.vocab_size=300"]
    assert prepare_data.main(["dataset=local", *text]) == 0
    (closed,) = (tmp_path / "data").glob(f"*/{name}")
    before = {path: path.stat().st_ino for path in closed.parent.iterdir()}
    closed.chmod(0)
    for path in (place.corpus, closed.parent):
        done = held.run("scripts/prepare_data.py", "dataset=local", *text, f"dataset.path={path}", folder=tmp_path)
        assert done.status == 2
        said = done.errors.splitlines()[-1]
        assert str(closed) in said and "cannot be read (Permission denied" in said and said.endswith(": make it readable")
    assert {path: path.stat().st_ino for path in closed.parent.iterdir()} == before


# --- generate --------------------------------------------------------------------------------------------------------


def written(place: Workplace, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    capsys.readouterr()
    assert generate.main([f"runs_dir={place.runs}", "device=cpu", "max_new_tokens=12", *options]) == 0
    return capsys.readouterr().out


def test_generate_continues_the_prompt_and_repeats_itself(shared: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    first = written(shared, capsys, "prompt=the sea")
    assert first.startswith("the sea") and len(first.rstrip("\n")) > len("the sea")
    assert written(shared, capsys, "prompt=the sea") == first
    assert written(shared, capsys, "prompt=the sea", "seed=1") != first
    greedy = [written(shared, capsys, "prompt=the sea", "temperature=0", f"seed={seed}") for seed in (0, 1)]
    assert greedy[0] == greedy[1]


def test_generate_takes_a_run_by_name_and_the_newest_without_one(shared: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    newest, named = written(shared, capsys, "prompt=a"), written(shared, capsys, "prompt=a", "run=mla")
    assert newest == named != written(shared, capsys, "prompt=a", "run=mha")


@pytest.mark.parametrize(
    "prompt", ["a, b = (c) [d] {e}", "'quoted' and \"quoted\"", "${model.d_model}", "null,", "null", "1e3", "x: y"]
)
def test_generate_takes_the_prompt_as_it_stands(shared: Workplace, prompt: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert written(shared, capsys, f"prompt={prompt}", "max_new_tokens=2").startswith(prompt)


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("max_new_tokens=1000", r"exceed the model's 32 positions; ask for at most \d+ new tokens"),
        ("temperature=-1", r"temperature=-1.0 must be 0 \(greedy\) or from 0.001 to 1e\+30"),
        ("temperature=warm", r"temperature=warm must be a number"),
        ("temperature=1e-45", r"temperature=1e-45 must be 0 \(greedy\) or from 0.001 to 1e\+30"),
        ("temperature=0.00099", r"temperature=0.00099 must be 0"),
        (f"seed={10**23}", rf"seed={10**23} is too large; choose a whole number below 2\^63"),
        (f"seed=-{2**64}", r"seed=-\d+ is too large"),
        ("prompt=a\udcff", r"^prompt is not UTF-8 \(byte 2\)"),
        ("top_p=2", r"top_p=2.0 must be in \(0, 1\]"),
        ("top_k=0", r"top_k=0 must be at least 1"),
        ("step=graph", r"step=graph needs a CUDA device, not cpu"),
        (f"prompt={'the sea ' * 30}", r"^a prompt of \d+ tokens exceeds the model's 32 positions"),
        ("promt=x", r"promt is not an option here; did you mean prompt\?"),
        ("run=mlaa", r"run=mlaa is no run .*did you mean mla\?"),
        ("device=gpu", r"device=gpu is unknown"),
        ("attention.backend=flash", r"attention.backend=flash is unknown; choose one of auto, reference"),
    ],
)
def test_generate_refuses_in_one_sentence_before_it_prints(
    shared: Workplace, option: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    with pytest.raises(UserError, match=sentence) as refused:
        generate.main([f"runs_dir={shared.runs}", "device=cpu", "max_new_tokens=2", "prompt=the sea", option])
    assert len(str(refused.value).splitlines()) == 1 and capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("written_bytes", "shown"),
    [
        ("né".encode(), "né"),
        ("né".encode()[:-1], "n"),
        ("a😀".encode()[:-1], "a"),
        ("a😀".encode()[:3], "a"),
        (b"a\xffb", "a\N{REPLACEMENT CHARACTER}b"),
        (b"\xf0\x9f", ""),
        (b"a\xf0\x9f b", "a\N{REPLACEMENT CHARACTER} b"),
    ],
)
def test_a_character_is_shown_when_it_is_whole_and_never_by_half(
    shared: Workplace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, written_bytes: bytes, shown: str
) -> None:
    def of_these_bytes(*_: object, **__: object) -> Iterator[torch.Tensor]:
        yield from (torch.tensor([byte]) for byte in written_bytes)

    monkeypatch.setattr("modeling.generation.generate", of_these_bytes)
    assert written(shared, capsys, "run=mha", "prompt=>") == f">{shown}\n"


def test_the_smallest_temperature_and_the_largest_seed_are_taken(shared: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    smallest = written(shared, capsys, "prompt=the sea", "temperature=0.001", f"seed={2**63 - 1}")
    assert smallest == written(shared, capsys, "prompt=the sea", "temperature=0")


def test_a_prompt_of_wrong_bytes_is_one_sentence_on_the_command_line(shared: Workplace) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "generate.py"), f"runs_dir={shared.runs}", b"prompt=the s\xe9a"]
    result = subprocess.run(command, cwd=shared.folder, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: prompt is not UTF-8 (byte 6); give it in that encoding\n"


def test_runs_are_the_projects_wherever_a_script_is_started() -> None:
    assert generate.GenerateOptions().runs_dir == compare_runs.CompareOptions().runs_dir == str(ROOT / "runs")


# --- check_attention -------------------------------------------------------------------------------------------------

CHECKED = [check.__name__.replace("_", " ") for check in CHECKS]
ROW = re.compile(r"^  (pass|FAIL)  (.+?) +\d+\.\d s(?:  (.+))?$", re.MULTILINE)


@pytest.mark.parametrize("variant", ["gqa", "mla"])
def test_check_attention_passes_a_sound_variant(variant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert check_attention.main([f"attention={variant}", *SIZE]) == 0
    assert ROW.findall(capsys.readouterr().out) == [("pass", name, "") for name in CHECKED]


def test_check_attention_tries_every_variant_of_a_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_attention.main(["attention=mqa,gqa,mha", *SIZE, "attention.n_kv_heads=3"]) == 1
    said = capsys.readouterr().out
    assert said.count("n_kv_heads=3 does not divide") == 3 and said.endswith("0 of 3 variants hold: not mqa, gqa, mha\n")


def test_check_attention_says_the_summarys_bytes_and_checks_every_kind_of_layer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["attention=mla_shared_latent", *SIZE, "model.n_layers=5", "attention.sharing_layers=3"]
    config = load_train_config([*overrides, "name=tested"])
    with torch.device("meta"):
        facts = model_facts(build_model(config, vocab_size=64), config)
    queries = MultiheadLatentAttention._query_input

    def later(attention: MultiheadLatentAttention, x_BTD: torch.Tensor) -> torch.Tensor:
        return queries(attention, x_BTD.roll(-1, dims=1) if attention.reads_latents else x_BTD)

    monkeypatch.setattr(MultiheadLatentAttention, "_query_input", later)
    assert check_attention.main(overrides) == 1
    said = capsys.readouterr().out
    assert f"KV cache    {facts.cache.bytes_per_token:,} bytes per token in bfloat16" in said
    assert "the first 3 of 5 differ" in said  # the second reads one layer back, the third two
    assert re.search(r"FAIL  no token sees the future .*outputs before token 12 changed with it", said)


def test_check_attention_refuses_sizes_that_do_not_fit() -> None:
    with pytest.raises(UserError, match=r"attention=gqa: n_kv_heads=3 does not divide n_heads=2; choose one of"):
        check_attention.main(["attention=gqa", *SIZE, "attention.n_kv_heads=3"])


@pytest.mark.parametrize("kernel", ["triton", "flashinfer", "gluon"])
def test_check_attention_refuses_kernels_that_cannot_compute_the_checks(
    kernel: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for interpreted in ("0", "1"):
        monkeypatch.setenv("TRITON_INTERPRET", interpreted)
        with pytest.raises(
            UserError, match=f"^attention.kernel={kernel} cannot compute the checks, .*take attention.kernel=torch"
        ):
            check_attention.main(["attention=mla", *SIZE, f"attention.kernel={kernel}"])
    with pytest.raises(UserError, match=r"attention.backend=sdpa_cudnn .*cpu"):
        check_attention.main(["attention=gqa", *SIZE, "attention.backend=sdpa_cudnn"])
    assert capsys.readouterr().out == ""


def rows_with(
    changes: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> dict[str, tuple[str, str]]:
    """What check_attention says of gqa.py with these changes: the verdict and the remark of each row, of which some fail."""
    file = Path(gqa.__file__)
    source = file.read_text()
    for right, wrong in changes.items():
        assert source.count(right) == 1, right
        source = source.replace(right, wrong)
    changed: dict[str, Any] = {"__name__": gqa.__name__}
    exec(compile(source, str(file), "exec"), changed)
    monkeypatch.setitem(MECHANISMS, "gqa", changed["GroupedQueryAttention"])
    assert check_attention.main(["attention=mha", *SIZE]) == 1
    said = capsys.readouterr()
    found = {name: (verdict, remark) for verdict, name, remark in ROW.findall(said.out)}
    passed = [name for name, (verdict, _) in found.items() if verdict == "pass"]
    assert said.err == "" and f"{len(passed)} of {len(found)} hold" in said.out
    assert [name for name in found if name in CHECKED] == CHECKED
    return found


def test_check_attention_finds_planted_bugs_and_ends_with_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {
        "causal=self.causal,": "causal=False,",
        "else self.n_kv_heads * (self.head_dim": "else 1 + self.n_kv_heads * (self.head_dim",
    }
    rows = rows_with(changes, monkeypatch, capsys)
    assert list(rows) == CHECKED
    failed = {name: remark for name, (verdict, remark) in rows.items() if verdict == "FAIL"}
    assert "outputs before token 1 changed with it" in failed["no token sees the future"]
    assert re.search(r"256 bytes measured, 260 by formula", failed["measured cache bytes equal the formula"])
    assert len(failed) < len(CHECKS)


@pytest.mark.parametrize(
    ("wrong", "remark"),
    [
        ("self.q_projection(", r"AttributeError: .* object has no attribute 'q_projection'"),
        ("self.n_heads(", r"TypeError: 'int' object is not callable"),
        ("{}['q_proj'](", r"KeyError: 'q_proj'"),
        ("self._queries(torch.ones(5) + ", r"RuntimeError: The size of tensor a \(5\) must match"),
    ],
    ids=["AttributeError", "TypeError", "KeyError", "RuntimeError"],
)
def test_check_attention_reports_a_mistake_in_forward_as_rows_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], wrong: str, remark: str
) -> None:
    rows = rows_with({"self._queries(": wrong}, monkeypatch, capsys)
    assert list(rows) == CHECKED
    line = Path(gqa.__file__).read_text().partition("self._queries(")[0].count("\n") + 1
    assert re.fullmatch(rf"{remark}.* \(modeling/attention/gqa\.py:{line}\)", rows["no token sees the future"][1])
    assert rows["measured cache bytes equal the formula"][0] == "pass"  # which calls no forward


@pytest.mark.parametrize(
    ("right", "wrong", "remark"),
    [
        ("self.positions, ", "self.position, ", "AttributeError: .*'positions'"),
        ("= positions, causal, dropout", "= positions, causal", "ValueError: not enough values to unpack"),
    ],
)
def test_check_attention_reports_a_variant_that_no_model_can_be_built_with(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], right: str, wrong: str, remark: str
) -> None:
    rows = rows_with({right: wrong}, monkeypatch, capsys)
    assert list(rows) == ["it builds into a model", *CHECKED]
    assert rows["it builds into a model"][0] == "FAIL"
    assert re.match(remark, rows["it builds into a model"][1])


# --- compare_runs ----------------------------------------------------------------------------------------------------


def test_compare_runs_puts_both_variants_into_files_and_a_json_line(
    shared: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bytes_run = shared.train("mla_bytes", "budget.steps=30", "attention=mla")
    before = contents(shared.runs)
    capsys.readouterr()
    out = tmp_path / "a folder, with commas"
    assert (
        compare_runs.main([str(shared.runs / "mha"), "mla_bytes", f"runs_dir={shared.runs}", f"out={out}", "tracking=none"])
        == 0
    )
    said = capsys.readouterr().out
    (record,) = records(said)
    (table,) = record["tables"]
    rows = {row["variant"]: row for row in table["setups"]}
    for name, run in (("mha", shared.runs / "mha"), ("mla", bytes_run)):
        summary = summary_of(run)
        for key in ("parameters", "tokens", "perplexity", "bits_per_byte", "cache_bytes_per_token"):
            assert rows[name][key] == summary[key], (name, key)
        assert f"{summary['bits_per_byte']:.4f}" in said
    assert {file.name for file in out.iterdir() if file.stat().st_size > 0 and str(file) in said} == {
        "comparison.md",
        "comparison.csv",
        "comparison.json",
        "comparison.png",
    }
    assert contents(shared.runs) == before


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["mhaa"], r"run=mhaa is no run .*did you mean mha\?"),
        (["tracking=w&b"], r"tracking=w&b is unknown"),
        (["split=tset"], r"split=tset is unknown; did you mean test\?"),
    ],
)
def test_compare_runs_refuses_in_one_sentence(shared: Workplace, arguments: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        compare_runs.main([f"runs_dir={shared.runs}", *arguments])


# --- prepare_data ----------------------------------------------------------------------------------------------------


def test_training_uses_what_prepare_data_prepared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = Workplace(tmp_path)
    data = ["dataset=local", f"dataset.path={place.corpus}", "tokenizer=bytes", f"data_dir={tmp_path / 'data'}"]
    assert prepare_data.main(data) == 0
    assert "local is ready: tokens train" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*") if path.is_file()}
    place.train("run")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*") if path.is_file()} == before


def test_prepare_data_reads_what_is_there_to_its_end_on_demand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = Workplace(tmp_path)
    overrides = ["dataset=local", f"dataset.path={place.corpus}", "tokenizer=bytes", f"data_dir={tmp_path / 'data'}"]
    assert prepare_data.main(overrides) == 0
    (file,) = (tmp_path / "data").glob("*/train.bin")
    whole = file.read_bytes()
    file.write_bytes(b"?" + whole[1:])
    assert prepare_data.main(overrides) == 0 and file.read_bytes() != whole
    assert prepare_data.main([*overrides, "verify=true"]) == 0 and file.read_bytes() == whole
    assert "train.bin has other content" in capsys.readouterr().err
