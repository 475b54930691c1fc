"""Whatever stands in a checkpoint or in the records of a run is read or refused in one sentence."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import torch
import yaml

from harness.report.comparison import as_text, compare, write_tables
from harness.runs.load import load_trained
from harness.training.checkpoint import latest_checkpoint, load_checkpoint
from harness.training.optimizer import build_optimizer
from modeling.attention import EXECUTION
from modeling.gpt import GPT
from tests.fuzz.conftest import Fuzzing
from tests.report.test_comparison import evaluate, make_run
from tests.support.micro import Workplace
from tests.support.mutations import as_json, mutated_bytes, mutated_value
from tests.support.tiny_model import optimizer_config, save_checkpoint, tiny_model


def resign(folder: Path) -> None:
    """The manifest of what is there: a fault that hashes cannot show."""
    names = ("model.safetensors", "optimizer.safetensors", "state.json")
    manifest = {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in ((name, (folder / name).read_bytes()) for name in names)
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


def contents_of(model: GPT) -> dict[str, bytes]:
    """Bit for bit: a damaged checkpoint that was taken may have left a NaN, which equals nothing."""
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


def test_a_damaged_checkpoint_is_loaded_or_refused_and_a_refused_one_changes_nothing(
    fuzzing: Fuzzing, choice: random.Random, tmp_path: Path
) -> None:
    trained, model = tiny_model(0), tiny_model(1)
    optimizer, fresh = build_optimizer(trained, optimizer_config()), build_optimizer(model, optimizer_config())
    for parameter in trained.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    folder = save_checkpoint(tmp_path, model=trained, optimizer=optimizer, state={"step": 3, "seconds": 1.5})
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    state = json.loads(whole["state.json"])

    def attempt() -> None:
        found = latest_checkpoint(tmp_path)
        assert found is not None
        load_checkpoint(found, model=model, optimizer=fresh)

    for number in fuzzing.share(14):
        before = contents_of(model)
        generator = torch.get_rng_state()
        name = choice.choice(list(whole))
        if choice.random() < 0.1:
            (folder / name).write_bytes(whole[choice.choice(list(whole))])
        elif name == "state.json" and choice.random() < 0.5:
            (folder / name).write_bytes(as_json(mutated_value(state, choice)))
        else:
            (folder / name).write_bytes(mutated_bytes(whole[name], choice))
        if name != "manifest.json" and choice.random() < 0.8:
            resign(folder)
        refused = fuzzing.outcomes["refused"]
        fuzzing.try_one(f"{name} {number}", attempt, leaves=tmp_path)
        if fuzzing.outcomes["refused"] > refused:
            assert contents_of(model) == before, number
            assert torch.equal(generator, torch.get_rng_state()), number
        for kept, content in whole.items():
            (folder / kept).write_bytes(content)


def test_a_run_with_odd_files_gives_its_model_or_is_refused(fuzzing: Fuzzing, choice: random.Random, tmp_path: Path) -> None:
    place = Workplace(tmp_path)
    run = place.train("fuzzed", "tokenizer=bpe", "tokenizer.vocab_size=300", "budget.steps=1")
    (checkpoint,) = run.glob("checkpoints/step-*")
    files = [run / "config.yaml", run / "tokenizer.json", checkpoint / "state.json", checkpoint / "model.safetensors"]
    whole = {file: file.read_bytes() for file in (*files, checkpoint / "manifest.json")}
    config = yaml.safe_load(whole[run / "config.yaml"])

    def attempt() -> None:
        trained = load_trained(run, device=torch.device("cpu"), precision=torch.float32, execution=EXECUTION)
        trained.model(torch.tensor([(trained.tokenizer.encode("the sea") or [0])[:1]]))

    for number in fuzzing.share(5):
        file = choice.choice(files)
        if file.name == "config.yaml" and choice.random() < 0.7:
            file.write_bytes(as_json(mutated_value(config, choice)))  # which is YAML too
        elif file.suffix == ".json" and choice.random() < 0.7:
            file.write_bytes(as_json(mutated_value(json.loads(whole[file]), choice)))
        else:
            file.write_bytes(mutated_bytes(whole[file], choice))
        resign(checkpoint)
        fuzzing.try_one(f"{file.name} {number}", attempt, leaves=run)
        for kept, content in whole.items():
            kept.write_bytes(content)


def test_damaged_records_are_compared_or_refused(fuzzing: Fuzzing, choice: random.Random, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    for seed in (0, 1):
        evaluate(make_run(runs, "mla", seed), cache_context=256, cache_bytes_at_context=640 * 256, cache_window=None)
    make_run(runs, "gqa")
    files = sorted(runs.rglob("*.json"))
    whole = {file: file.read_bytes() for file in files}

    def attempt() -> None:
        for every_cache in (False, True):
            comparison = compare([runs], every_cache=every_cache)
            as_text(comparison)
            write_tables(comparison, tmp_path / "tables")

    for number in fuzzing.share(10):
        file = choice.choice(files)
        if number % 3:
            file.write_bytes(as_json(mutated_value(json.loads(whole[file]), choice)))
        else:
            file.write_bytes(mutated_bytes(whole[file], choice))
        fuzzing.try_one(f"{file} {number}: {file.read_bytes()!r}", attempt, leaves=runs)
        file.write_bytes(whole[file])
