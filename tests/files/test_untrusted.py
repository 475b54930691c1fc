"""What somebody sent never runs, never leaves its folder and never allocates what its headers claim."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import io
import json
import os
import pickle
import resource
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from harness.config.build import build_model
from harness.config.checks import train_config
from harness.config.compose import load_train_config
from harness.config.run_config import load_run_config, read_run_config, save_run_config
from harness.config.schema import DatasetConfig, TrackingConfig
from harness.data import Tokenizer, open_prepared, prepare
from harness.data.prepare import prepared_as
from harness.data.prepared import DamagedData
from harness.entry.cli import finished_runs
from harness.errors import UserError, without_credentials
from harness.evaluation.probes import probe
from harness.files.atomic import read_json, write_json
from harness.files.metrics import read_metrics
from harness.files.untrusted import Unreadable, parse_object, read_object, stays_inside
from harness.hf.config_json import their_json
from harness.hf.shards import open_shards
from harness.report.comparison import compare
from harness.runs.load import load_trained
from harness.runs.text_settings import TEXT_FILE, load_text
from harness.study.results import load_results
from harness.tracking import open_tracker
from harness.training.checkpoint import load_checkpoint, verified
from modeling.attention import EXECUTION
from tests.fuzz.test_runs import resign
from tests.support.corpora import BPE, BYTES, folder_of_texts, local
from tests.support.micro import Workplace, contents

ROOT = Path(__file__).resolve().parents[2]


class Payload:
    """Unpickled, it creates a file."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return os.system, (f"touch {self.proof}",)


@pytest.fixture
def proof(tmp_path: Path) -> Path:
    return tmp_path / "executed"


@pytest.fixture
def pickles(proof: Path) -> dict[str, bytes]:
    """The payload in every wrapping that a Python library has for it."""
    as_torch, as_numpy = io.BytesIO(), io.BytesIO()
    torch.save({"weight": Payload(proof)}, as_torch)
    np.save(as_numpy, np.array([Payload(proof)], dtype=object), allow_pickle=True)
    return {
        "pickle": pickle.dumps(Payload(proof)),
        "torch": as_torch.getvalue(),
        "npy": as_numpy.getvalue(),
        "yaml": f"!!python/object/apply:os.system ['touch {proof}']\n".encode(),
        "text": json.dumps({"_target_": "os.system", "_args_": [f"touch {proof}"]}).encode(),
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    place = Workplace(tmp_path_factory.mktemp("outside"))
    place.train("sent", "tokenizer=bpe", "tokenizer.vocab_size=300", "budget.steps=1")
    return place


@pytest.fixture
def run(trained: Workplace, tmp_path: Path) -> Path:
    """A copy of a finished run."""
    return shutil.copytree(trained.runs / "sent", tmp_path / "runs" / "sent")


def load(run: Path) -> Any:
    return load_trained(run, device=torch.device("cpu"), precision=torch.float32, execution=EXECUTION)


def checkpoint_of(run: Path) -> Path:
    (folder,) = run.glob("checkpoints/step-*")
    return folder


def test_the_payload_would_run_where_pickles_are_loaded(pickles: dict[str, bytes], proof: Path) -> None:
    pickle.loads(pickles["pickle"])
    assert proof.exists()


@pytest.mark.parametrize("wrapping", ["pickle", "torch", "npy", "yaml", "text"])
@pytest.mark.parametrize(
    "file",
    [
        "config.yaml",
        "tokenizer.json",
        "summary.json",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
        "manifest.json",
    ],
)
def test_a_pickle_in_place_of_any_file_of_a_run_is_refused_and_never_run(
    file: str, wrapping: str, run: Path, pickles: dict[str, bytes], proof: Path
) -> None:
    folder = checkpoint_of(run) if file.endswith("safetensors") or file in ("state.json", "manifest.json") else run
    (folder / file).write_bytes(pickles[wrapping])
    if folder != run and file != "manifest.json":
        resign(folder)

    def use() -> None:
        trained = load(run)
        if file == "optimizer.safetensors":  # read by what trains on alone
            from harness.training.optimizer import build_optimizer

            optimizer = build_optimizer(trained.model, trained.config.optimizer)
            load_checkpoint(verified(folder), model=trained.model, optimizer=optimizer)
        compare([run])
        read_json(run / "summary.json")["wandb_id"]

    if (file, wrapping) == ("summary.json", "text"):  # an object, of which nothing is taken but known figures
        with pytest.raises(UserError, match="no run to compare"):
            compare([run])
    else:
        with pytest.raises(UserError):
            use()
    assert not proof.exists()


@pytest.mark.parametrize("wrapping", ["pickle", "torch", "npy", "yaml", "text"])
@pytest.mark.parametrize(
    "file", ["meta.json", "tokenizer.json", "train.bin", "train.starts.npy", "train.bytes.npy", "train.words.npy"]
)
def test_a_pickle_in_place_of_any_prepared_file_is_refused_and_never_run(
    file: str, wrapping: str, tmp_path: Path, pickles: dict[str, bytes], proof: Path
) -> None:
    folder_of_texts(tmp_path / "texts", 8)
    folder = prepare(local(tmp_path / "texts"), BPE, tmp_path / "data", progress=False).folder
    (folder / file).write_bytes(pickles[wrapping])
    if file != "meta.json":  # of the size that meta.json says
        meta = json.loads((folder / "meta.json").read_text())
        meta["files"][file] = len(pickles[wrapping])
        (folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError):
        Tokenizer.load(open_prepared(folder).tokenizer_file)
    assert not proof.exists()


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.txt"])
def test_a_pickle_in_place_of_a_corpus_is_text_or_refused_and_never_run(
    name: str, tmp_path: Path, pickles: dict[str, bytes], proof: Path
) -> None:
    for wrapping, content in pickles.items():
        folder = tmp_path / wrapping
        folder.mkdir()
        (folder / name).write_bytes(content)
        with pytest.raises(UserError) if not name.endswith(".txt") else contextlib.suppress(UserError):
            prepare(local(folder), BYTES, tmp_path / "data", progress=False)
    assert not proof.exists()


def test_nothing_in_the_project_can_run_what_it_reads() -> None:
    banned = {
        "pickle.load",
        "pickle.loads",
        "torch.load",
        "eval",
        "exec",
        "yaml.load",
        "yaml.unsafe_load",
        "yaml.full_load",
        "importlib.import_module",
        "hydra.utils.instantiate",
        "joblib.load",
        "marshal.loads",
        "shelve.open",
    }
    sources = [*ROOT.glob("*.py"), *(path for top in ("harness", "modeling", "scripts") for path in (ROOT / top).rglob("*.py"))]
    found = set()
    for file in sources:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                if ast.unparse(node.func) in banned:
                    found.add(f"{file.relative_to(ROOT)}: {ast.unparse(node.func)}")
                for keyword in node.keywords:
                    if keyword.arg in ("allow_pickle", "trust_remote_code") and ast.unparse(keyword.value) != "False":
                        found.add(f"{file.relative_to(ROOT)}: {keyword.arg}")
    # By names of the project's own lists, which they check.
    assert found == {
        "harness/evaluation/probes/__init__.py: importlib.import_module",
        "modeling/kernels/decode_kernels.py: importlib.import_module",
    }
    with pytest.raises(AssertionError, match="os is no probe"):
        probe("os")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("a: &a [x, x]\nb: &b [*a, *a]\n", "anchor"),
        ("a: !!python/object/apply:os.system [true]\n", "tag"),
        ("a: " + "[" * 10_000, "nested too deeply"),
        ("a: " + "9" * 10_000 + "\n", "cannot be read|must be|not a field"),
        ("a: ${oc.env:HOME\n", "a holds an interpolation"),
        ("a: '" + "${" * 100_000 + "'", "a holds an interpolation"),
        ("- a\n- b\n", "not a configuration"),
        ("name: x\x00", "cannot be read"),
        ('name: "\\UFFFFFFFF"\n', "cannot be read"),
        ("name: 2026-99-99\n", r"cannot be read \(month must be"),
        ("#" * 2_000_000, "more than any"),
    ],
)
def test_a_config_yaml_that_costs_memory_stack_or_more_is_refused(content: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(content)
    started = time.monotonic()
    with pytest.raises(UserError, match=sentence):
        load_run_config(tmp_path)
    assert time.monotonic() - started < 10


def test_interpolations_in_a_runs_configuration_are_text_and_reach_no_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_SECRET", "5ecret")
    config = load_train_config(["tokenizer=bytes"])
    save_run_config(config, tmp_path)
    container = yaml.safe_load((tmp_path / "config.yaml").read_text())
    container["tracking"]["notes"] = "${oc.env:A_SECRET} ${oc.decode:'1'} ${seed}"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(container))
    loaded = load_run_config(tmp_path)
    assert loaded.tracking.notes == container["tracking"]["notes"]
    save_run_config(loaded, tmp_path)
    assert "5ecret" not in (tmp_path / "config.yaml").read_text() and load_run_config(tmp_path) == loaded


@pytest.mark.parametrize("name", ["../outside", "/tmp/outside", "a/b", "..", ".hidden", "a\\b", "a\nb", "", "a b"])
def test_a_runs_name_cannot_leave_the_folder_of_runs(name: str) -> None:
    container = dataclasses.asdict(load_train_config(["tokenizer=bytes"]))
    with pytest.raises(UserError, match="plain folder name"):
        train_config(container | {"name": name})


@pytest.mark.parametrize("name", ["../x.parquet", "/etc/passwd", "a/../../x.jsonl", "..\\x.parquet", "", "é" * 128, "a/" * 600])
def test_names_of_a_datasets_files_cannot_leave_its_folder(name: str, tmp_path: Path) -> None:
    dataset = DatasetConfig(
        name="d", source="hub", hub_name="a/b", hub_revision="0" * 40, sha256={name: "0" * 64}, path=str(tmp_path)
    )
    with pytest.raises(UserError, match="leads out of the dataset's folder"):
        prepare(dataset, BYTES, tmp_path / "data", progress=False)
    assert not stays_inside(name)


@pytest.mark.parametrize("change", [{"name": "../d"}, {"name": ".."}, {"hub_name": "../.."}, {"hub_name": "a/../b"}])
def test_a_datasets_own_names_cannot_leave_their_folder(change: dict[str, str], tmp_path: Path) -> None:
    fields = {"name": "d", "source": "hub", "hub_name": "a/b", "hub_revision": "0" * 40} | change
    with pytest.raises(UserError, match=r"dataset\.(name|hub_name)="):
        prepare(DatasetConfig(**fields), BYTES, tmp_path / "data", progress=False)  # type: ignore[arg-type]


def test_links_in_a_run_lead_no_write_out_of_it(run: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("my own text\n")
    for name in ("summary.json.tmp", "config.yaml.tmp"):
        (run / name).symlink_to(mine)
    write_json(run / "summary.json", {"a": 1})
    save_run_config(load_run_config(run), run)
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").symlink_to(mine)
    with pytest.raises(UserError, match="is a link"):
        open_tracker(
            TrackingConfig(name="none"),
            run_dir=run,
            name="x",
            run_config={},
            group="g",
            job_type="train",
            tags=[],
            run_id=None,
            metrics_bytes=0,
        )
    assert mine.read_text() == "my own text\n"


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_a_checkpoint_of_links_is_damaged(file: str, run: Path, tmp_path: Path) -> None:
    folder = checkpoint_of(run)
    shutil.move(folder / file, tmp_path / file)
    (folder / file).symlink_to(tmp_path / file)
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged"):
        load(run)


@pytest.mark.parametrize("file", ["model.safetensors", "state.json", "manifest.json"])
def test_a_pipe_in_place_of_a_file_holds_nobody_up(file: str, run: Path) -> None:
    (checkpoint_of(run) / file).unlink()
    os.mkfifo(checkpoint_of(run) / file)
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged"):
        load(run)


@pytest.mark.parametrize("run_id", ["../../x", "a/b", "x" * 200, ".", ""])
def test_a_name_of_a_wandb_run_cannot_be_a_path(run_id: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such name"):
        open_tracker(
            TrackingConfig(name="none"),
            run_dir=tmp_path,
            name="x",
            run_config={},
            group="g",
            job_type="train",
            tags=[],
            run_id=run_id,
            metrics_bytes=None,
        )


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


@pytest.mark.parametrize(
    "header",
    [
        struct.pack("<Q", 2**62),
        struct.pack("<Q", 90_000_000) + b"{}",
        (lambda body: struct.pack("<Q", len(body)) + body)(
            json.dumps({"w": {"dtype": "F32", "shape": [2**30, 2**20], "data_offsets": [0, 2**52]}}).encode()
        ),
    ],
)
def test_a_tensor_file_that_claims_more_than_it_holds_is_refused_before_memory_is_taken(header: bytes, run: Path) -> None:
    folder = checkpoint_of(run)
    (folder / "model.safetensors").write_bytes(header)
    resign(folder)
    before = peak_megabytes()
    with pytest.raises(UserError, match=r"is damaged \(step-\d+: model.safetensors"):
        load(run)
    assert peak_megabytes() - before < 100


@pytest.mark.parametrize("header", [b"[" * 100_000, b'{"a":' * 100_000, b"[]", b"{", b'{"a": NaN}'])
def test_a_header_of_tensors_that_is_no_sound_json_is_refused(header: bytes, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(UserError, match=r"is no safetensors file \(its header: .*\): fetch it again$"):
        open_shards([file])


def test_an_array_or_a_count_that_claims_more_than_is_there_is_refused(tmp_path: Path) -> None:
    folder_of_texts(tmp_path / "texts", 8)
    folder = prepare(local(tmp_path / "texts"), BYTES, tmp_path / "data", progress=False).folder
    whole = json.loads((folder / "meta.json").read_text())
    huge = io.BytesIO()
    np.lib.format.write_array_header_1_0(huge, {"descr": "<i8", "fortran_order": False, "shape": (2**50,)})
    (folder / "train.starts.npy").write_bytes(huge.getvalue())
    files = whole["files"] | {"train.starts.npy": len(huge.getvalue())}
    for meta in (whole | {"files": files}, whole | {"files": files, "dtype": "|O"}):
        (folder / "meta.json").write_text(json.dumps(meta))
        with pytest.raises(DamagedData):
            open_prepared(folder)
    for changed in ({"dtype": "|O"}, {"dtype": "<u8"}, {"vocab_size": 2**40}, {"splits": whole["splits"] | {"../x": {}}}):
        (folder / "meta.json").write_text(json.dumps(whole | changed))
        with pytest.raises(DamagedData, match="not what `prepare` writes"):
            open_prepared(folder)


@pytest.mark.parametrize(
    "sizes",
    [
        {"model.d_model": 2**18, "model.n_layers": 200, "model.mlp_hidden": 2**18},
        {"model.max_seq_len": 2**26, "model.n_layers": 200, "model.d_model": 2**12},
        {"model.vocab_size": 2**32},
    ],
)
def test_sizes_of_terabytes_are_refused_before_memory_is_taken(sizes: dict[str, int]) -> None:
    config = load_train_config(["attention=mha_learned", "tokenizer=bytes"])
    for path, size in sizes.items():
        setattr(config.model, path.removeprefix("model."), size)
    before = peak_megabytes()
    with pytest.raises(UserError, match=r"takes [\d,]+ GB and this machine has"):
        build_model(config, vocab_size=257)
    assert peak_megabytes() - before < 500


@pytest.mark.parametrize(
    "size",
    [
        "model.d_model",
        "model.n_heads",
        "model.n_layers",
        "model.max_seq_len",
        "batch_size",
        "model.vocab_size",
        "attention.kv_lora_rank",
    ],
)
@pytest.mark.parametrize("value", [2**40, 2**63, 10**30])
def test_a_size_that_no_machine_has_is_refused_by_name(size: str, value: int) -> None:
    with pytest.raises(UserError, match=rf"{size}=.*(beyond anything|whole number)"):
        load_train_config(["attention=mla", "tokenizer=bytes", f"{size}={value}"])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": NaN}', "no number of JSON"),
        (b'{"a": 1e999}', "no finite number"),
        (b'{"a": ' + b"9" * 5000 + b"}", "digits"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b"\xff\xfe{}", "utf-8"),
        (b"[]", "no JSON object"),
        (b"", "Expecting value"),
    ],
)
def test_json_is_a_sound_object_or_a_value_error_in_one_line(content: bytes, reason: str) -> None:
    with pytest.raises(Unreadable, match=reason) as caught:
        parse_object(content)
    assert "\n" not in str(caught.value)


def test_a_folder_or_a_pipe_is_no_json_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(Unreadable, match="no regular file"):
            read_object(place)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("any.json", lambda file: read_json(file)),
        ("config.json", lambda file: their_json(file)),
        ("metrics.jsonl", lambda file: read_metrics(file.parent)),
        (TEXT_FILE, lambda file: load_text(file.parent)),
        ("meta.json", lambda file: open_prepared(file.parent)),
        ("meta.json", lambda file: prepared_as("", file.parent.parent, tokenizer="")),
        ("summary.json", lambda file: finished_runs(file.parent.parent)),
    ],
)
def test_a_value_error_of_ours_is_not_called_a_file_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, read: Callable[[Path], object]
) -> None:
    file = tmp_path / "all" / "one" / name
    file.parent.mkdir(parents=True)
    file.write_text("{}\n")
    (file.parent / "config.yaml").write_text("{}\n")

    def fail(*_: object, **__: object) -> None:
        raise ValueError("ours")

    monkeypatch.setattr("harness.files.untrusted.json.loads", fail)
    with pytest.raises(ValueError, match=r"^ours$"):
        read(file)


def test_a_value_error_of_ours_is_not_called_a_config_yaml_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.yaml").write_text("{}\n")

    def fail(_: str) -> None:
        raise ValueError("ours")

    monkeypatch.setattr("harness.config.run_config._check_yaml", fail)
    with pytest.raises(ValueError, match=r"^ours$"):
        read_run_config(tmp_path)


def test_a_sentence_is_one_line_without_control_characters_or_credentials() -> None:
    error = UserError("name=a\nb\x1b[2J\ud800 at https://me:pa55@host/x?token=abc&n=1 failed")
    assert str(error) == "name=a b\\x1b[2J\\ud800 at https://host/x?&n=1 failed"
    assert len(str(UserError("x" * 10**6))) < 3000
    assert without_credentials("http://host/a@b") == "http://host/a@b"


def test_a_refused_run_is_left_as_it_was(run: Path) -> None:
    (run / "tokenizer.json").write_bytes(b"{}")
    before = contents(run)
    with pytest.raises(UserError, match=r"tokenizer\.json is not a tokenizer\.json"):
        load(run)
    assert contents(run) == before


def test_a_tokenizer_whose_ids_would_take_gigabytes_is_refused(tmp_path: Path) -> None:
    Tokenizer.train_bpe(["the sea the ship"], 260).save(tmp_path)
    file = tmp_path / "tokenizer.json"
    specification = json.loads(file.read_text())
    specification["model"]["vocab"]["a"] = 2**31
    file.write_text(json.dumps(specification))
    before = peak_megabytes()
    with pytest.raises(UserError, match="an id of its vocabulary"):
        Tokenizer.load(file)
    assert peak_megabytes() - before < 100


@pytest.mark.parametrize("record", [{}, {"runs": None}, {"runs": [{"name": 3}]}, {"runs": [], "sweep": [], "arms": []}])
def test_a_study_of_another_form_is_refused_in_a_sentence(record: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "study.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"study\.json is not as it was written"):
        load_results(tmp_path)


def test_a_tokenizer_that_breaks_the_library_down_is_refused_without_a_word_of_the_librarys(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    Tokenizer.train_bpe(["the sea the ship"], 300).save(tmp_path)
    file = tmp_path / "tokenizer.json"
    specification = json.loads(file.read_text())
    specification["model"]["continuing_subword_prefix"] = "##"
    file.write_text(json.dumps(specification))
    with pytest.raises(UserError, match="a merge lacks the prefix"):
        Tokenizer.load(file)
    assert capfd.readouterr().err == ""
