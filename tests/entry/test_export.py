"""scripts/export.py: a run's folder, loaded by transformers, is the run: every shipped variant, of a stock class or our own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from harness.errors import UserError
from harness.hf import classes, export
from harness.runs.load import TrainedModel, load_trained
from modeling.attention import EXECUTION, attends
from modeling.attention.contract import relative_error
from modeling.generation import generate
from scripts.export import main
from tests.support import transformers4
from tests.support.micro import Workplace, contents, summary_of
from tests.support.variants import SHIPPED_BY_CODE, deep_enough

pytest.importorskip("transformers")

BPE = ["tokenizer=bpe", "tokenizer.vocab_size=300"]
RUNS = {
    "gqa": ["attention=gqa", "attention.n_kv_heads=1", "model.tie_embeddings=false"],
    "qwen": ["attention=mha", "attention.qk_norm=true", *BPE],
    "mla": ["attention=mla", "attention.q_lora_rank=20", "attention.latent_scale=true", "model.norm_eps=1e-5", *BPE],
    "learned": ["attention=mha_learned"],
    "biases": [
        "attention=gqa",
        "attention.n_kv_heads=1",
        "attention.projection_bias=qkv",
        "attention.rope_scaling={rope_type:yarn,factor:4.0,original_max_position_embeddings:8}",
        *BPE,
    ],
    "partial": ["attention=gqa_partial", "attention.n_kv_heads=1", *BPE],
    "gated": ["attention=gqa_gated", "attention.n_kv_heads=1", "attention.qk_norm=true", *BPE],
    "states": ["attention=gdn_3_1", "attention.gate=element", "attention.qk_norm=true", "model.n_layers=4", *BPE],
    # The tokenizer that transformers' Qwen2 comes with, whatever a folder holds.
    "qwen2": ["attention=gqa", "attention.n_kv_heads=1", "attention.projection_bias=qkv", "tokenizer=pretrained"],
}
CLASSES = {
    "gqa": "LlamaForCausalLM",
    "qwen": "Qwen3ForCausalLM",
    "mla": "DeepseekV3ForCausalLM",
    "biases": "LlamaForCausalLM",
    "partial": "Phi3ForCausalLM",
    "gated": "Qwen3_5ForCausalLM",
    "states": "Qwen3_5ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}
OWN = "AttentionAblationForCausalLM"
ROOT = Path(__file__).resolve().parents[2]
TEXTS = [
    "e\u0301 is not é",
    "in 1234 + 56 = 0x7f\n\n    return x",
    "the captain saw  a whale",
    "réef 中文 🙂\tand\n\nthe sea ",
    "",
    "<|endoftext|>",
    "a<|endoftext|>b <s> [SEP]",
    "\x00\x7f\x80\xad\xff",
    "don't",
    " x",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """Runs that have learned a little, and what each is exported to."""
    place = Workplace(tmp_path_factory.mktemp("export"))
    qwen2 = write_qwen2_tokenizer(place.folder / "qwen2.json", place.corpus)
    for name, overrides in RUNS.items():
        path = [f"tokenizer.path={qwen2}"] if "tokenizer=pretrained" in overrides else []
        place.train(name, "budget.steps=20", *overrides, *path)
    assert place.evaluate(f"run={place.runs / 'gqa'}", "split=test") == 0
    for name in [*CLASSES, "learned"]:
        assert main([f"run={name}", f"runs_dir={place.runs}", f"to={place.folder / 'out' / name}"]) == 0
    return place


def write_qwen2_tokenizer(file: Path, corpus: Path) -> Path:
    """A byte-level BPE with the normalizer and the split pattern that transformers' Qwen2Tokenizer has."""
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(PRETOKENIZE_REGEX), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.train(
        [str(corpus)],
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    backend.save(str(file))
    return file


def ours(place: Workplace, name: str) -> TrainedModel:
    return load_trained(place.runs / name, device=torch.device("cpu"), precision=torch.float32, execution=EXECUTION)


def theirs(place: Workplace, name: str) -> tuple[Any, Any]:
    import transformers

    folder = place.folder / "out" / name
    return transformers.AutoModelForCausalLM.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", CLASSES)
def test_the_exported_model_is_of_a_stock_class_and_gives_the_same_logits(place: Workplace, name: str) -> None:
    trained, (model, _) = ours(place, name), theirs(place, name)
    assert type(model).__name__ == CLASSES[name] and type(model).__module__.startswith("transformers.models.")
    assert model.dtype == torch.float32
    assert classes.difference(trained.model, model) < 1e-5


@pytest.mark.parametrize("name", SHIPPED_BY_CODE)
def test_every_shipped_variant_is_exported_and_is_the_run(
    place: Workplace, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    depth = deep_enough([f"attention={name}"]) or ["model.n_layers=2"]
    run = place.train(f"shipped-{name}", "budget.steps=2", f"attention={name}", *depth)
    folder = tmp_path / name
    capsys.readouterr()
    assert main([f"run={run}", f"to={folder}"]) == 0
    said = capsys.readouterr().out
    trained = load_trained(run, device=torch.device("cpu"), precision=torch.float32, execution=EXECUTION)
    (model, tokenizer), misfits = classes.load(folder), classes.misfits(trained.config)
    stock = "The class is a stock one of transformers" in said
    assert stock is not misfits and stock is (type(model).__name__ != OWN) and type(model).__name__ in said
    if not stock:
        assert f"The class is our own, because no stock one that we write has {' and '.join(misfits)}" in said
        trained.model.set_execution(backend="auto")  # the kernel that torch takes, as in theirs
        assert torch.equal(model(torch.arange(20)[None]).logits, trained.model(torch.arange(20)[None])[..., :257])
    assert classes.difference(trained.model, model) < 1e-5
    check_text(trained, model, tokenizer)
    elements = max(attention.cache_formula for attention in trained.model.attentions)
    (cached,) = re.findall(r"^\| cached per token and layer \| (.*) \|$", (folder / "README.md").read_text(), re.MULTILINE)
    assert f"{elements} elements (" in cached
    assert ("a state whatever the context (state 4 x 16 x 16, tail 3 x 128)" in cached) != all(
        map(attends, trained.model.attentions)
    )


@pytest.mark.parametrize("name", CLASSES)
def test_both_write_the_same_greedy_text(place: Workplace, name: str) -> None:
    check_text(ours(place, name), *theirs(place, name))


def check_text(trained: TrainedModel, model: Any, tokenizer: Any) -> None:
    """Both continue a prompt alike, and decode it alike."""
    prompt = tokenizer("the sea", return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=16)[0, prompt["input_ids"].shape[1] :].tolist()
    tokens = trained.tokenizer.encode("the sea")
    expected = [int(token) for token in generate(trained.model, [tokens], max_new_tokens=16, temperature=0)]
    assert written == expected[: len(written)] and (len(written) == 16 or written[-1] == trained.tokenizer.end_of_text)
    assert tokenizer.decode(written, skip_special_tokens=True) == trained.tokenizer.decode(written)


@pytest.mark.parametrize("name", CLASSES)
def test_a_pipeline_continues_a_prompt(place: Workplace, name: str) -> None:
    import transformers

    write = transformers.pipeline("text-generation", model=str(place.folder / "out" / name))
    (continued,) = write("the sea", max_new_tokens=8, do_sample=False)
    trained = ours(place, name)
    tokens = trained.tokenizer.encode("the sea")
    for token in generate(trained.model, [tokens], max_new_tokens=8, temperature=0):
        tokens.append(int(token))
        if tokens[-1] == trained.tokenizer.end_of_text:
            break
    assert continued["generated_text"] == trained.tokenizer.decode(tokens)


@pytest.mark.parametrize("name", CLASSES)
def test_generation_stops_at_the_end_of_text(place: Workplace, name: str) -> None:
    trained, (model, tokenizer) = ours(place, name), theirs(place, name)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == trained.tokenizer.end_of_text
    assert tokenizer.model_max_length == trained.model.max_seq_len == model.config.max_position_embeddings


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", CLASSES)
def test_the_exported_tokenizer_gives_the_same_tokens_and_text(place: Workplace, name: str, text: str) -> None:
    tokenizer, trained = tokenizers_of(place, name)
    tokens = tokenizer(text)["input_ids"]
    assert tokens == trained.encode(text)
    assert tokenizer.decode(tokens) == trained.decode(tokens)
    assert trained.decode(tokens) == (unicodedata.normalize("NFC", text) if name == "qwen2" else text)


def test_biases_with_any_bpe_are_exported_with_the_runs_own_tokenizer(place: Workplace, tmp_path: Path) -> None:
    """Of Qwen2's type the same files give another tokenizer: one that composes e + U+0301 and splits digits."""
    import transformers

    tokenizer, trained = tokenizers_of(place, "biases")
    text = "e\u0301 and 1234"
    assert tokenizer(text)["input_ids"] == trained.encode(text)
    folder = shutil.copytree(place.folder / "out" / "biases", tmp_path / "qwen2")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "qwen2"}))
    assert transformers.AutoTokenizer.from_pretrained(folder)(text)["input_ids"] != trained.encode(text)


def test_a_tokenizer_that_no_stock_class_gives_goes_with_our_own(
    place: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classes, "families", lambda config: ["Qwen2"])
    with pytest.raises(UserError, match=r"its Qwen2ForCausalLM another tokenizer than the run's \('e.*take kind=auto"):
        main([f"run={place.runs / 'biases'}", f"to={tmp_path / 'out'}", "kind=stock"])
    exported = export.export_run(place.runs / "biases", tmp_path / "out")
    assert exported.own and exported.why_own == "because no stock one that we write has this tokenizer beside it"
    check_text(ours(place, "biases"), *classes.load(tmp_path / "out"))


@transformers4.needed
def test_transformers_4_loads_the_same_model_and_tokenizer(place: Workplace, tmp_path: Path) -> None:
    prompt_BT = torch.randint(250, (2, 32), generator=torch.Generator().manual_seed(1))
    known = [name for name, architecture in CLASSES.items() if architecture not in classes.SINCE_5]
    assert len(known) == len(CLASSES) - 2
    folders = [place.folder / "out" / name for name in known]
    answers = transformers4.answers(folders, prompt_BT, tmp_path, texts=["the sea", *filter(None, TEXTS)])
    for name, answer in zip(known, answers, strict=True):
        trained = ours(place, name)
        with torch.inference_mode():
            logits_BTC = trained.model(prompt_BT)[..., : trained.model.vocab_size]
        assert (answer.architecture, answer.dtype) == (CLASSES[name], "torch.float32")
        assert relative_error(answer.logits_BTC, logits_BTC) < 1e-5
        tokens = [trained.tokenizer.encode(text) for text in ["the sea", *filter(None, TEXTS)]]
        assert answer.tokens == tokens and answer.decoded == [trained.tokenizer.decode(each) for each in tokens]
        written = [*tokens[0]]
        for token in generate(trained.model, [tokens[0]], max_new_tokens=8, temperature=0):
            written.append(int(token))
        assert answer.written == trained.tokenizer.decode(written)


def tokenizers_of(place: Workplace, name: str) -> tuple[Any, Any]:
    import transformers

    return transformers.AutoTokenizer.from_pretrained(place.folder / "out" / name), ours(place, name).tokenizer


def test_every_byte_is_its_own_number(place: Workplace) -> None:
    tokenizer, _ = tokenizers_of(place, "gqa")
    assert tokenizer.is_fast and len(tokenizer) == 257
    text = "".join(map(chr, range(256)))
    assert tokenizer(text)["input_ids"] == list(text.encode())


def test_a_post_processor_that_adds_tokens_is_left_out(place: Workplace, tmp_path: Path) -> None:
    run = shutil.copytree(place.runs / "mla", tmp_path / "runs" / "adds")
    specification = json.loads((run / "tokenizer.json").read_text())
    (eos,) = specification["added_tokens"]
    special = {"id": eos["content"], "ids": [eos["id"]], "tokens": [eos["content"]]}
    first = [{"SpecialToken": {"id": eos["content"], "type_id": 0}}]
    specification["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [*first, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [*first, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {eos["content"]: special},
    }
    (run / "tokenizer.json").write_text(json.dumps(specification))
    exported = export.export_run(run, tmp_path / "out")
    _, tokenizer = classes.load(exported.folder)
    assert tokenizer("the sea")["input_ids"] == theirs(place, "mla")[1]("the sea")["input_ids"]


def test_the_folder_holds_what_is_promised_and_the_card_the_runs_figures(place: Workplace) -> None:
    folder = place.folder / "out" / "gqa"
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
    }
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    card, summary = (folder / "README.md").read_text(), summary_of(place.runs / "gqa")
    (evaluation,) = [json.loads(path.read_text()) for path in (place.runs / "gqa" / "evaluations").glob("*.json")]
    assert f"| local | validation | {summary['evaluated_tokens']:,} | {summary['loss']:.4f} |" in card
    assert f"| local | test | {evaluation['evaluated_tokens']:,} | {evaluation['loss']:.4f} |" in card
    assert f"{summary['cache_bytes_per_token']:,} bytes" in card and "32 elements (k 1 x 16, v 1 x 16)" in card
    assert f"{evaluation['bits_per_byte']:.4f}" in card and "LlamaForCausalLM" in card
    assert f"| transformers {classes.version()}, which wrote it; config.json has the fields that 4.57 reads" in card


def test_the_card_of_an_unfinished_run_claims_no_figures(place: Workplace, tmp_path: Path) -> None:
    run = shutil.copytree(place.runs / "gqa", tmp_path / "runs" / "half")
    (run / "summary.json").unlink()
    card = (export.export_run(run, tmp_path / "out").folder / "README.md").read_text()
    assert "had not finished training" in card and "| step 20 |" in card and "perplexity" not in card


def test_without_a_stock_class_kind_stock_is_refused_and_nothing_appears(place: Workplace, tmp_path: Path) -> None:
    for kind, sentence in {"stock": r"its Llama has no attention.positions=learned", "odd": r"kind=odd is unknown"}.items():
        with pytest.raises(UserError, match=sentence) as refused:
            main([f"run={place.runs / 'learned'}", f"to={tmp_path / 'out'}", f"kind={kind}"])
        assert len(str(refused.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_kind_own_writes_our_class_where_a_stock_one_would_do(
    place: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([f"run={place.runs / 'mla'}", f"to={tmp_path / 'out'}", "kind=own"]) == 0
    assert "our own, as it was asked for: call harness.hf.classes.register()" in capsys.readouterr().out
    model, tokenizer = classes.load(tmp_path / "out")
    assert type(model).__name__ == OWN
    check_text(ours(place, "mla"), model, tokenizer)
    assert "The class is our own, as it was asked for." in (tmp_path / "out" / "README.md").read_text()


def test_the_cards_own_lines_load_the_model_where_the_project_can_be_imported(place: Workplace) -> None:
    folder = place.folder / "out" / "learned"
    assert {path.name for path in folder.iterdir()} == {path.name for path in (place.folder / "out" / "gqa").iterdir()}
    card = (folder / "README.md").read_text()
    assert "our own, because no stock one that we write has attention.positions=learned" in card and "register()" in card
    assert "register" not in (place.folder / "out" / "gqa" / "README.md").read_text()
    (lines,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    known = os.environ | {"PYTHONPATH": str(ROOT)}
    written = subprocess.run([sys.executable, "-c", lines], cwd=folder.parent, env=known, capture_output=True, text=True)
    assert written.returncode == 0, written.stderr
    trained = ours(place, "learned")
    tokens = trained.tokenizer.encode("The sea")
    tokens += [int(token) for token in generate(trained.model, [tokens], max_new_tokens=20, temperature=0)]
    assert written.stdout.rstrip("\n") == trained.tokenizer.decode(tokens).rstrip("\n")


def test_a_pipeline_continues_a_prompt_with_our_class(place: Workplace) -> None:
    import transformers

    classes.register()
    write = transformers.pipeline("text-generation", model=str(place.folder / "out" / "learned"))
    (continued,) = write("the sea", max_new_tokens=8, do_sample=False)
    trained = ours(place, "learned")
    tokens = trained.tokenizer.encode("the sea")
    tokens += [int(token) for token in generate(trained.model, [tokens], max_new_tokens=8, temperature=0)]
    assert continued["generated_text"] == trained.tokenizer.decode(tokens)


def test_a_target_that_holds_something_is_left_as_it_was(place: Workplace, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"exists and is no empty folder"):
        main([f"run={place.runs / 'gqa'}", f"to={target}"])
    with pytest.raises(UserError, match=r"exists and is no empty folder"):
        main([f"run={place.runs / 'gqa'}", f"to={target / 'mine.txt'}"])
    assert contents(tmp_path) == {"out/mine.txt": b"mine"}


def test_an_empty_target_is_filled(place: Workplace, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert main([f"run={place.runs / 'gqa'}", f"to={tmp_path / 'out'}"]) == 0
    assert contents(tmp_path / "out").keys() == contents(place.folder / "out" / "gqa").keys()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


SAVE = classes.save_theirs


def break_weights(theirs: Any, folder: Path, stops: Sequence[int], begins: Sequence[int]) -> None:
    with torch.no_grad():
        theirs.model.norm.weight[0] += 0.5
    SAVE(theirs, folder, stops, begins)


def fill_the_disk(theirs: Any, folder: Path, stops: Sequence[int], begins: Sequence[int]) -> None:
    (folder / "config.json").write_text("{}")
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("failing", "sentence"),
    [(break_weights, r"the exported logits differ from the run's by \d"), (fill_the_disk, r"cannot be written \(No sp")],
)
def test_a_failed_export_leaves_no_folder(
    place: Workplace, tmp_path: Path, failing: Any, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classes, "save_theirs", failing)
    with pytest.raises(UserError, match=sentence):
        main([f"run={place.runs / 'gqa'}", f"to={tmp_path / 'out'}"])
    assert list(tmp_path.iterdir()) == []


def test_a_target_is_asked_for(place: Workplace) -> None:
    with pytest.raises(UserError, match=r"to= is missing"):
        main([f"run={place.runs / 'gqa'}"])
