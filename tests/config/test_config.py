"""harness/config: what composes, what is refused and how it is said, what a run is and how it is called."""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.config import compose as configuration
from harness.config.build import build_layer, build_model
from harness.config.checks import train_config
from harness.config.compose import (
    compose,
    default_name,
    derive,
    implied,
    load_eval_config,
    load_train_config,
    options_of,
    quoted,
    sweep_jobs,
)
from harness.config.identity import (
    EXECUTION_FIELDS,
    LATER_FIELDS,
    SEED_FIELDS,
    differences,
    flat,
    identity,
    later_options,
    setup_hash,
)
from harness.config.places import CONFIGS, ROOT
from harness.config.run_config import FREE_TEXT, load_run_config, save_run_config
from harness.config.schema import EXTRAS, BudgetConfig, TrainConfig
from harness.config.typed import fields_below, typed
from harness.entry.cli import parse_options, whole_numbers
from harness.errors import UserError
from harness.evaluation.probes import probe
from modeling.attention import MECHANISMS
from modeling.cache_formats import FORMS
from modeling.shapes import shapes_only
from scripts.downstream_eval import DownstreamOptions
from scripts.generate import GenerateOptions
from tests.support.projects import copy_project
from tests.support.variants import SHIPPED_BY_CODE

GROUPS = ("attention", "model", "dataset", "tokenizer", "optimizer", "schedule", "tracking", "parallel", "experiment")
# Set by the defaults list and not by a file of the machine on which the tests run.
PLAIN = ["dataset=wikitext2", "name=run"]


def train(*overrides: str) -> TrainConfig:
    return load_train_config([*PLAIN, *overrides])


def refusal(*overrides: str, load: Any = load_train_config) -> str:
    """The sentence with which a command line is refused."""
    with pytest.raises(UserError) as refused:
        load(list(overrides))
    return str(refused.value)


# --- what composes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", GROUPS)
def test_the_groups_of_the_command_line_exist_and_no_others(group: str) -> None:
    folders = {path.name for path in CONFIGS.iterdir() if path.is_dir()}
    assert group in folders and folders - set(GROUPS) <= {"local", "study", "hydra"}
    assert options_of(group)


CHOICES = [(group, option) for group in GROUPS for option in options_of(group)]


@pytest.mark.parametrize(("group", "option"), CHOICES, ids=lambda value: value)
def test_every_choice_composes_and_has_the_name_of_its_file(group: str, option: str) -> None:
    overrides = ["name=run", f"{group}={option}"] + (["tokenizer.path=gpt2"] if option == "pretrained" else [])
    config = load_train_config(overrides)
    if group == "attention":
        assert config.attention["name"] == option
    elif group != "experiment":
        assert getattr(config, group).name == option


@functools.cache
def size(model: str) -> dict[str, Any]:
    return compose("train", [*PLAIN, f"model={model}"])["model"]


@pytest.mark.parametrize("attention", SHIPPED_BY_CODE)
@pytest.mark.parametrize("model", options_of("model"))
def test_every_variant_builds_at_every_model_size(model: str, attention: str) -> None:
    """Composed once a variant and once a size, which Hydra takes 0.1 s for."""
    config = train_config(compose("train", [*PLAIN, f"attention={attention}"], {"model": size(model)}))
    assert config.model.name == model
    with shapes_only():
        built = build_model(config, vocab_size=257)
    assert (len(built.blocks), built.embedding.embedding_dim) == (config.model.n_layers, config.model.d_model)
    integers = [
        value for value in config.attention.values() if not isinstance(value, (str, bool, float, list, dict, type(None)))
    ]
    assert integers and all(type(value) is int for value in integers)


@pytest.mark.parametrize("file", sorted((CONFIGS / "experiment").glob("*.yaml")), ids=lambda file: file.stem)
def test_an_experiment_begins_with_its_command_time_and_result(file: Path) -> None:
    package, command, expected_time, expected_result = file.read_text().splitlines()[:4]
    assert package == "# @package _global_"
    assert re.match(rf"# python train_model.py (-m )?experiment={file.stem}( |$)", command)
    assert expected_time.startswith("# Expected time: ") and expected_result.startswith("# Expected result: ")


@pytest.mark.parametrize("file", sorted((CONFIGS / "experiment").glob("*.yaml")), ids=lambda file: file.stem)
def test_an_experiment_gets_every_value_that_it_sets_and_the_command_line_has_the_last_word(file: Path) -> None:
    written = yaml.safe_load(file.read_text())
    config = flat(compose("train", [f"experiment={file.stem}"]))
    chosen = {key.removeprefix("override /"): value for entry in written.pop("defaults") for key, value in entry.items()}
    assert {group: config[f"{group}.name"] for group in chosen} == chosen
    assert {path: config[path] for path in flat(written)} == flat(written)
    last = compose("train", [f"experiment={file.stem}", "dataset=stdlib", "intervals.evaluate=7", "budget.tokens=99"])
    assert (last["dataset"]["name"], last["intervals"]["evaluate"], last["budget"]["tokens"]) == ("stdlib", 7, 99)


def test_without_arguments_it_is_mha_and_the_whole_configuration_is_typed() -> None:
    config = train()
    assert (config.attention["name"], config.model.name, config.seed, config.data_seed) == ("mha", "tiny", 0, 0)
    assert (config.tracking.name, config.cache.dtype, config.budget) == ("wandb", "bfloat16", BudgetConfig())
    assert config.runs_dir == str(ROOT / "runs")
    assert typed(TrainConfig, dataclasses.asdict(config), "") == config


def test_a_saved_configuration_comes_back_equal(tmp_path: Path) -> None:
    config = train("attention=mla", "model.n_layers=2", "optimizer.lr=1e-3", "tracking.notes=a: b, ${c} 'd'")
    save_run_config(config, tmp_path)
    assert load_run_config(tmp_path) == config
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_the_model_owns_the_sizes_and_the_variants_follow() -> None:
    sizes = ["model.d_model=48", "model.n_heads=8", "model.head_dim=10"]
    mla, gqa = train("attention=mla", *sizes).attention, train("attention=gqa", *sizes).attention
    assert (mla["kv_lora_rank"], mla["qk_rope_head_dim"], mla["v_head_dim"], mla["n_kv_heads"]) == (24, 5, 10, 8)
    assert (gqa["n_kv_heads"], gqa["head_dim"]) == (2, 10)
    assert train("attention=mha", "model.dropout=0.25").attention["dropout"] == 0.25


# --- refusals --------------------------------------------------------------------------------------------------------

VARIANTS = ", ".join(sorted(path.stem for path in (CONFIGS / "attention").glob("*.yaml")))
# command line -> the sentence. Every refusal names the field, the value and the remedy.
REFUSED = {
    "attention=mlaa": "attention=mlaa does not exist; did you mean mla?",
    "attention=flash": f"attention=flash does not exist; choose from {VARIANTS}",
    "attention=null": f"attention=null does not exist; choose from {VARIANTS}",
    "model=tyny": "model=tyny does not exist; did you mean tiny?",
    "model={a:1}": "model={'a': 1} does not exist; choose from deepseek_v2_lite, deepseek_v3, gpt2, medium, mini, small, tiny",
    "tracking=tensorboard": "tracking=tensorboard does not exist; choose from none, trackio, wandb",
    "attentoin=mla": "attentoin is not a field of the configuration; did you mean attention?",
    "model.dmodel=64": "model.dmodel is not a field of the configuration; did you mean model.d_model?",
    "d_model=64": "d_model is not a field of the configuration; did you mean model.d_model?",
    "lr=0.1": "lr is not a field of the configuration; did you mean optimizer.lr?",
    "path=x": "path is not a field of the configuration; did you mean dataset.path or tokenizer.path?",
    "budget.epochs=3": "budget.epochs is not a field of the configuration; budget has steps, tokens",
    "seed.x=3": "seed.x is not a field of the configuration; seed is a single value",
    "quantum=3": "quantum is not a field of the configuration; python train_model.py --help shows all that there are",
    "attention=mla attention.kv_rank=8": "attention.kv_rank is not a field of the configuration; "
    "did you mean attention.kv_lora_rank?",
    "attention=mla attention.mechanism=gqa": "attention.kv_lora_rank is not a field of the configuration; did you mean "
    "q_lora_rank?",
    "mla": "mla is not of the form key=value; did you mean attention=mla?",
    "=3": "=3 is not of the form key=value; name a field and its value",
    "+new=1": "new is not a field of the configuration; python train_model.py --help shows all that there are",
    "~new": "new is not a field of the configuration; python train_model.py --help shows all that there are",
    "++seed=1": "++seed=1: fields are neither added nor deleted; write seed=1",
    "~seed": "~seed: fields are neither added nor deleted; write seed=value",
    "~tracking": "~tracking: fields are neither added nor deleted; write tracking=none",
    "+experiment=mqar": "+experiment=mqar: fields are neither added nor deleted; write experiment=mqar",
    "~model": "~model: fields are neither added nor deleted; write model=NAME",
    "--seed=1": "--seed=1: options are written without dashes; write seed=1",
    "attention=mha,mla": "attention=mha,mla is a list of choices; add -m to run them all",
    "hydra.run.dir=x": "hydra.run.dir=x: Hydra's own settings are fixed here; leave it out",
    "seed=one": "seed=one must be a whole number",
    "seed=1.5": "seed=1.5 must be a whole number",
    "seed=-1": "seed=-1 must be 0 or more",
    "seed=9223372036854775808": "seed=9223372036854775808 is too large for torch's generator; choose a seed below 2^63",
    "model.d_model=null": "model.d_model=null must be a whole number",
    "model.d_model=[1,2]": "model.d_model=[1, 2] must be a whole number",
    "attention=gqa model.n_heads=many": "model.n_heads=many must be a whole number",
    "model.n_layers=0": "model.n_layers=0 must be 1 or more",
    "optimizer.lr=high": "optimizer.lr=high must be a finite number",
    "optimizer.lr=nan": "optimizer.lr=nan must be a finite number",
    "optimizer.betas=0.9": "optimizer.betas=0.9 must be a list like [a, b]",
    "optimizer.betas=[0.9,x]": "optimizer.betas[1]=x must be a finite number",
    "overwrite=yes": "overwrite=yes must be true or false",
    "attention.qk_norm=1": "attention.qk_norm=1 must be true or false",
    "attention.backend=null": "attention.backend=null is unknown; choose from "
    "auto, reference, sdpa, sdpa_cudnn, sdpa_efficient, sdpa_flash, sdpa_math",
    "device=null": "device=null is unknown; choose from auto, cpu, cuda, mps",
    "cache.dtype=null": f"cache.dtype=null is unknown; choose one of {FORMS}",
    'batch_size="3"': 'batch_size="3" must be a whole number, without quotes',
    'optimizer.lr="0.1"': 'optimizer.lr="0.1" must be a finite number, without quotes',
    "budget=5": "budget=5 must be a group of fields: tokens, steps",
    "device=gpu": "device=gpu is unknown; did you mean cpu?",
    "device=cuda:1": "device=cuda:1 is unknown; did you mean cuda?",
    "precision=fp16": "precision=fp16 is unknown; choose from auto, bfloat16, float32",
    "compile=true": "compile=true is unknown; choose from auto, off, on",
    "cache.dtype=int3": f"cache.dtype=int3 is unknown; choose one of {FORMS}",
    "schedule.name=linear": "schedule.name=linear is unknown; choose from cosine, wsd",
    "parallel=tensor": "parallel=tensor does not exist; choose from ddp, fsdp",
    "parallel.name=fsdp2": "parallel.name=fsdp2 is unknown; did you mean fsdp?",
    "tracking.name=mlflow": "tracking.name=mlflow is unknown; choose from none, trackio, wandb",
    "tokenizer.name=word": "tokenizer.name=word is unknown; choose from bpe, bytes, pretrained",
    "attention.mechanism=linear": f"attention.mechanism=linear is unknown; choose from {', '.join(sorted(MECHANISMS))}",
    "attention.backend=flash": "attention.backend=flash is unknown; did you mean sdpa_flash?",
    "budget.tokens=10 budget.steps=5": "budget.tokens=10 and budget.steps=5 both set the length of the run; give one",
    "batch_size=4 micro_batch_size=3": "micro_batch_size=3 does not divide batch_size=4; choose a divisor",
    "batch_size=0": "batch_size=0 must be 1 or more",
    "intervals.log=0": "intervals.log=0 must be 1 or more",
    "evaluation.max_tokens=0": "evaluation.max_tokens=0 must be 1 or more",
    "evaluation.stride_fraction=0": "evaluation.stride_fraction=0.0 must be above 0 and at most 1 (a window)",
    "model.norm_eps=-1": "model.norm_eps=-1 must be 0 or more",
    "model.init_std=-1": "model.init_std=-1 must be 0 or more",
    "model.dropout=1": "model.dropout=1.0 must be at least 0 and below 1",
    "attention.dropout=-0.1": "attention.dropout=-0.1 must be at least 0 and below 1",
    "schedule.warmup_fraction=-0.1": "schedule.warmup_fraction=-0.1 is no fraction: give a number from 0 to 1",
    "schedule.final_lr_fraction=1.5": "schedule.final_lr_fraction=1.5 is no fraction: give a number from 0 to 1",
    "schedule.final_lr_fraction=nan": "schedule.final_lr_fraction=nan must be a finite number",
    "optimizer.lr=0": "optimizer.lr=0.0 trains nothing: give a rate above 0",
    "optimizer.betas=[0.9]": "optimizer.betas=[0.9] must be two numbers in [0, 1), such as [0.9, 0.95]",
    "optimizer.betas=[0.9,1]": "optimizer.betas=[0.9, 1.0] must be two numbers in [0, 1), such as [0.9, 0.95]",
    "optimizer.eps=0": "optimizer.eps=0.0 must be above 0",
    "optimizer.weight_decay=-1": "optimizer.weight_decay=-1 must be 0 or more",
    "optimizer.grad_clip=-1": "optimizer.grad_clip=-1 must be 0 or more",
    "model.causal=false": "model.causal=false cannot be trained to predict the next token, which every position would "
    "then see; build the GPT from modeling/ for other objectives",
    "name=a/b": "name=a/b must be one plain folder name: letters, digits and . _ = , + - only",
    "name=.hidden": "name=.hidden must be one plain folder name: letters, digits and . _ = , + - only",
    "model.d_model=${nowhere}": "model.d_model: Interpolation key 'nowhere' not found; write a value, or the path of a field",
    "attention.n_kv_heads=${derive:'n_heads/2'}": "derive:'n_heads/2' may use d_model, n_layers, n_heads, head_dim, "
    "max_seq_len, integers, + - * // min max, nothing else",
}


def split(line: str) -> list[str]:
    return line.split(" ")


@pytest.mark.parametrize("line", REFUSED)
def test_a_mistake_is_said_in_one_sentence_with_field_value_and_remedy(line: str) -> None:
    assert refusal(*split(line)) == REFUSED[line]


def as_shown(node: ast.AST) -> str:
    """The text of a string or f-string with `x` for its values; nothing for any other expression."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(as_shown(part) or "x" for part in node.values)
    return ""


def test_every_refusal_in_the_file_is_one_sentence() -> None:
    """What the table above cannot reach (a broken YAML of one's own, say) is at least no paragraph."""
    trees = [ast.parse(file.read_text()) for file in (ROOT / "harness" / "config").glob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    calls = [node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func) == "UserError"]
    texts = [text for call in calls if (text := as_shown(call.args[0]))]
    assert len(texts) > 20
    assert not [text for text in texts if "\n" in text or ". " in text.replace(". _", "") or text.endswith(".")]


REFUSED_IN_EVAL = {
    "split=tset": "split=tset is unknown; did you mean test?",
    "splt=test": "splt is not a field of the configuration; did you mean split?",
    "attention=mla": "attention=mla: attention is the run's own here; only single fields such as attention.backend can be set",
    "model=tiny": "model is not a field of the configuration; python eval_model.py --help shows all that there are",
    "device=tpu": "device=tpu is unknown; did you mean cpu?",
    "cache.dtype=q4": f"cache.dtype=q4 is unknown; choose one of {FORMS}",
    "cache.window=0": "cache.window=0 sees nothing; choose 1 or more, or null for the whole context",
    "cache.sinks=4": "cache.sinks=4 stay visible beside a window; choose 0 or more and set cache.window",
    "stride_fraction=2": "stride_fraction=2.0 must be above 0 and at most 1 (a window)",
    "batch_size=0": "batch_size=0 must be 1 or more",
    "max_tokens=-1": "max_tokens=-1 must be 1 or more",
    "extras=[beyond,latent]": "extras=latent is unknown; did you mean latents?",
    "extras=beyond": "extras=beyond must be a list like [a, b]",
    "extras_max_tokens=0": "extras_max_tokens=0 must be 1 or more",
    "per_document=maybe": "per_document=maybe must be true or false",
    "dataset=stdlibb": "dataset=stdlibb does not exist; did you mean stdlib?",
}


@pytest.mark.parametrize("line", REFUSED_IN_EVAL)
def test_a_mistake_in_an_evaluation_is_said_in_one_sentence(line: str) -> None:
    assert refusal(*split(line), load=load_eval_config) == REFUSED_IN_EVAL[line]


def test_a_field_at_the_schemas_default_may_be_set_though_its_yaml_is_silent() -> None:
    assert "split_seed" not in (CONFIGS / "dataset" / "stdlib.yaml").read_text()
    assert train("dataset=stdlib", "dataset.split_seed=3").dataset.split_seed == 3


@pytest.mark.parametrize("dataset", ["mqar", "passkey"])
def test_a_corpus_of_symbols_is_read_byte_by_byte_unless_a_tokenizer_is_chosen(dataset: str) -> None:
    plain = load_train_config([f"dataset={dataset}"])
    assert (plain.tokenizer.name, plain.name) == ("bytes", f"{dataset}-tiny-mha-seed0")
    assert identity(plain) == identity(load_train_config([f"dataset={dataset}", "tokenizer=bytes"]))
    assert train(f"dataset={dataset}", "tokenizer=bpe").tokenizer.name == "bpe"  # which harness/data refuses
    assert (train("dataset=stdlib").tokenizer.name, load_eval_config([f"dataset={dataset}"]).split) == ("bpe", "test")
    assert implied("train", [f"dataset={dataset}", "seed=3"]) == ["tokenizer=bytes"]
    for said in (
        ["train", f"dataset={dataset}", "tokenizer=bytes"],
        ["train", "dataset=stdlib"],
        ["eval", f"dataset={dataset}"],
    ):
        assert implied(said[0], said[1:]) == []


def test_null_is_accepted_for_a_group_that_is_absent_by_default() -> None:
    assert train("experiment=null") == train()
    assert load_eval_config(["dataset=null"]) == load_eval_config([])


# --- arithmetic ------------------------------------------------------------------------------------------------------

SIZES = {"d_model": 128, "n_layers": 4, "n_heads": 6, "head_dim": 32}


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("7", 7),
        ("n_heads", 6),
        ("d_model - 2 * head_dim", 64),
        ("(n_heads + 1) // 2", 3),
        ("max(2, n_heads // 4)", 2),
        ("min(4 * head_dim, d_model // 2, 65)", 64),
        ("max(1)", 1),
        ("-(-7 // 2)", None),
        ("2 ** 3", None),
        ("d_model / 2", None),
        ("vocab_size", None),
        ("1.5", None),
        ("'x'", None),
        ("True", None),
        ("abs(2)", None),
        ("max()", None),
        ("max(1, key=2)", None),
        ("__import__('os')", None),
        ("d_model.real", None),
        ("[1][0]", None),
        ("d_model // 0", None),
        ("d_model //", None),
        ("", None),
    ],
)
def test_derive_does_integer_arithmetic_on_the_models_sizes_and_nothing_else(expression: str, value: int | None) -> None:
    if value is not None:
        assert derive(expression, SIZES) == value
        return
    with pytest.raises(UserError, match=re.escape(f"derive:'{expression}'")) as refused:
        derive(expression, SIZES)
    assert len(str(refused.value).splitlines()) == 1


# --- types -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "value", "result"),
    [
        (int, 3, 3),
        (int, 2e6, 2_000_000),
        (float, 3, 3.0),
        (str, 3, "3"),
        (str, True, "true"),
        (str, 0.5, "0.5"),
        (bool, False, False),
        (int | None, None, None),
        (int | None, 3, 3),
        (list[float], (1, 2.5), [1.0, 2.5]),
        (dict[str, str], {1: "a"}, {"1": "a"}),
        (BudgetConfig, {"steps": 3}, BudgetConfig(steps=3)),
    ],
)
def test_typed_takes_what_means_the_same(kind: Any, value: Any, result: Any) -> None:
    taken = typed(kind, value, "field")
    assert taken == result and type(taken) is type(result)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (int, True),
        (int, 2.5),
        (int, "3"),
        (int, None),
        (float, True),
        (float, "x"),
        (float, float("inf")),
        (str, None),
        (str, [1]),
        (bool, 1),
        (bool, "true"),
        (list[int], 3),
        (list[int], "ab"),
        (list[int], [1, "a"]),
        (dict[str, int], []),
        (BudgetConfig, 3),
        (BudgetConfig, {"stepz": 3}),
        (int | None, "x"),
    ],
)
def test_typed_refuses_what_does_not(kind: Any, value: Any) -> None:
    with pytest.raises(UserError, match=r"^field"):
        typed(kind, value, "field")


def test_the_names_of_formats_are_read_without_torch_and_are_those_of_the_cache() -> None:
    from modeling.attention.quantisation import NAMED
    from modeling.cache_formats import BITS

    assert list(NAMED) == list(BITS)
    read = "import sys, harness.config.schema; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", read], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("k3v9", r"^cache.dtype=k3v9 is unknown; choose one of float32, .*int4, or kXvY .* two of 16, 8, 4 \(k8v4\)"),
        ("int3", r"^cache.dtype=int3 is unknown; choose one of float32, "),
        ("k8v8", r"^cache.dtype=k8v8 is int8 by another name: write that$"),
        ("k4v4_rotated", r"^cache.dtype=k4v4_rotated is int4_rotated by another name: write that$"),
        ("kc16v4", r"^cache.dtype=kc16v4 is unknown; choose one of float32, .* kcXvY has a scale .*, X 8 or 4 \(kc4v4\)$"),
        ("kc4v3", r"^cache.dtype=kc4v3 is unknown; choose one of float32, "),
        ("kc4v4_rotated", r"^cache.dtype=kc4v4_rotated would mix the channels that have scales of their own: write kc4v4$"),
        ("bfloat16_rotated", r"^cache.dtype=bfloat16_rotated would turn what is stored as it is: write bfloat16$"),
    ],
)
def test_a_format_that_there_is_not_is_refused_with_the_forms_there_are(name: str, sentence: str) -> None:
    for load in (load_eval_config, load_train_config):
        with pytest.raises(UserError, match=sentence):
            load([f"cache.dtype={name}"])


@pytest.mark.parametrize("name", ["int4", "k8v4", "k16v4", "fp8_rotated", "k4v8_rotated", "kc4v4", "kc8v16"])
def test_formats_of_few_bits_are_chosen_by_name(name: str) -> None:
    assert load_eval_config([f"cache.dtype={name}"]).cache.dtype == name


def test_the_extras_of_the_command_line_are_those_that_can_be_measured_and_all_of_them_by_default() -> None:
    assert all(probe(name).why_not for name in EXTRAS)
    assert load_eval_config([]).extras == list(EXTRAS)
    assert load_eval_config(["extras=[]", "extras_max_tokens=7"]).extras == []


def test_a_missing_field_is_named() -> None:
    with pytest.raises(UserError, match=r"^model.d_model is missing from the configuration; give it a value$"):
        container = compose("train", PLAIN)
        del container["model"]["d_model"]
        train_config(container)


# --- what a run is ---------------------------------------------------------------------------------------------------

# Another value for every field. Fields that are checked against each other change together.
ANOTHER: dict[str, Any] = {
    "attention.rope_scaling": {"rope_type": "linear", "factor": 2.0},
    "attention.projection_bias": "all",
    "attention.rope_frequencies": "stored",
    "device": "cpu",
    "precision": "float32",
    "compile": "off",
    "capture": "off",
    "cache.dtype": "float32",
    "model.mlp": "relu2",
    "attention.mechanism": None,
    "attention.backend": "reference",
    "attention.kernel": "triton",
    "optimizer.name": "muon",
    "optimizer.betas": [0.8, 0.9],
    "optimizer.width_base": 64,
    "model.default_width_base": 64,
    "schedule.name": "wsd",
    "tokenizer.name": "bytes",
    "tracking.name": "none",
    "parallel.name": "fsdp",
    "model.causal": None,
    "micro_batch_size": 1,
    "dataset.source": "stdlib",
    "dataset.sha256": {"a": "b"},
    "attention.q_lora_rank": 16,
    "on_nonfinite": "skip",
    "spikes.sigma": 6.0,
}
# Numbers that are absent (null) by default.
NUMBERS = ("attention.window", "max_tokens", "micro_batch_size", "muon_lr", "muon_momentum", "decay_fraction", "vocab_size")


def changed(value: Any, path: str) -> Any:
    if path in ANOTHER:
        return ANOTHER[path]
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value / 2 or 0.25 if isinstance(value, float) else value + 1
    if isinstance(value, list):
        return [*value, value[0] if value else "a"]
    return f"{value}x" if isinstance(value, str) else {"tokens": 9, "steps": 9}.get(path.rpartition(".")[2], "1")


def with_change(container: dict[str, Any], path: str, value: Any) -> TrainConfig:
    copy = json.loads(json.dumps(container))
    *groups, last = path.split(".", 2 if path.startswith("dataset.sha256.") else -1)  # file names hold dots
    here = copy
    for group in groups:
        here = here[group]
    here[last] = value
    return train_config(copy)


def test_execution_fields_are_no_part_of_what_a_run_is_and_all_others_are() -> None:
    config = train("attention=mla")
    container = dataclasses.asdict(config)
    for path, value in flat(container).items():
        another: Any = changed(value, path)
        if another is None:
            continue  # the only other value is refused, or is another variant's
        if path.endswith(NUMBERS) and not isinstance(another, (int, float)):
            another = 1
        is_execution = any(path == field or path.startswith(f"{field}.") for field in EXECUTION_FIELDS)
        is_execution |= path.startswith("dataset.synthetic_")  # which says nothing of WikiText
        other = with_change(container, path, another)
        assert other != config, path
        assert (identity(other) == identity(config)) == is_execution, path
        assert (not differences(other, config)) == is_execution, path


def test_the_place_of_a_local_corpus_is_part_of_what_a_run_is_and_that_of_any_other_is_not() -> None:
    for dataset, is_part in (("local", True), ("classic_books", False), ("stdlib", False)):
        here, there = (train(f"dataset={dataset}", f"dataset.path=/{place}") for place in "ab")
        assert (identity(here) != identity(there)) == is_part


def test_what_a_synthetic_corpus_is_made_of_is_part_of_its_own_runs_alone() -> None:
    for dataset, is_part in (("mqar", True), ("passkey", True), ("stdlib", False)):
        for change in ("synthetic_documents=9", "synthetic_tokens=300", "synthetic_pairs=[5]"):
            here, there = train(f"dataset={dataset}"), train(f"dataset={dataset}", f"dataset.{change}")
            assert (identity(here) != identity(there)) == is_part
    assert not any("synthetic" in path for path in identity(train()))


def test_differences_name_the_field_and_both_values() -> None:
    mine, theirs = train("attention=mla", "seed=1"), train("attention=mla", "model.n_layers=2")
    assert differences(mine, theirs) == [
        "data_seed is 0 there and 1 here",
        "model.n_layers is 2 there and 4 here",
        "seed is 0 there and 1 here",
    ]
    assert "attention.kv_lora_rank is absent there and 64 here" in differences(mine, train("attention=mha"))


def test_seeds_of_one_setup_share_a_hash_and_everything_else_changes_it() -> None:
    plain = train("attention=mla")
    for same in (
        ["seed=1"],
        ["seed=1", "data_seed=5"],
        ["device=cpu"],
        ["tracking=none"],
        ["attention.backend=sdpa"],
        ["parallel=fsdp", "parallel.mixed_precision=true"],
    ):
        assert setup_hash(train("attention=mla", *same)) == setup_hash(plain), same
    for other in (["attention.kv_lora_rank=16"], ["optimizer.lr=0.1"], ["dataset=stdlib"], ["budget.steps=3"]):
        assert setup_hash(train("attention=mla", *other)) != setup_hash(plain), other
    assert re.fullmatch("[0-9a-f]{12}", setup_hash(plain))


def test_fields_that_came_later_leave_the_hash_of_older_setups_alone_until_they_say_something() -> None:
    plain = train("attention=mla")
    older = dataclasses.asdict(plain)
    for field in ("checkpoints", "on_nonfinite", "skip_limit", "spikes", "init_from", "init_setup"):
        del older[field]
    del older["model"]["vocab_size"]
    later = LATER_FIELDS | later_options("mla")
    for path in later_options("mla"):
        del older["attention"][path.removeprefix("attention.")]
    assert train_config(older) == plain  # a run's config.yaml of before
    leaves = {path: value for path, value in identity(plain).items() if path not in (*SEED_FIELDS, *later, "init_from")}
    assert setup_hash(plain) == hashlib.sha256(json.dumps(leaves, sort_keys=True).encode()).hexdigest()[:12]
    for path, value in LATER_FIELDS.items():
        assert flat(older | dataclasses.asdict(plain))[path] == value
        another = 10**6 if path == "model.vocab_size" else changed(value, path)
        assert setup_hash(with_change(dataclasses.asdict(plain), path, another)) != setup_hash(plain), path
    assert setup_hash(train("attention=mla", "attention.gate=head")) != setup_hash(plain)


def test_the_setups_of_before_have_the_hashes_of_before() -> None:
    """As they stand in the summaries of runs and in study.json: another hash, and a study refuses to go on with its folder."""
    hashes = {"mha": "586f56f0f1f7", "gqa": "28f872940d80", "mla": "f79a64509678", "mla_plain": "6c31ab709054"}
    found = {name: setup_hash(load_train_config([f"attention={name}", "model=tiny"])) for name in hashes}
    assert found == hashes


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("on_nonfinite=ignore", "on_nonfinite=ignore is unknown; choose from skip, stop"),
        ("checkpoints.keep=0", "checkpoints.keep=0 must be 1 or more"),
        ("skip_limit=0", "skip_limit=0 must be 1 or more"),
        ("spikes.sigma=-1", "spikes.sigma=-1.0 must be above 0, such as 6, or null to skip no spike"),
        ("spikes.window=1", "spikes.window=1 must be 2 or more"),
    ],
)
def test_what_guards_a_run_is_checked_at_the_door(override: str, sentence: str) -> None:
    assert refusal(override) == sentence


YARN = "attention.rope_scaling={rope_type:yarn,factor:4.0,original_max_position_embeddings:16}"
DEEPSEEKS_YARN = f"{YARN[:-1]},mscale:1.0,mscale_all_dim:1.0}}"


@pytest.mark.parametrize("control", ["mha_wide", "mha_decoupled"])
def test_a_control_of_mla_is_not_trained_at_another_softmax_scale_than_mla(control: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"attention={control}: rope_scaling.mscale_all_dim=1.0 is DeepSeek's and scales"):
        load_train_config([f"attention={control}", DEEPSEEKS_YARN])
    config, latent = (load_train_config([f"attention={name}", YARN]) for name in (control, "mla"))
    controls, mla = (build_layer(each) for each in (config, latent))
    assert controls.scale == pytest.approx(mla.scale) == pytest.approx(mla.qk_width**-0.5)
    for name in ("mla", "gqa"):  # what stock models of both kinds mean by it
        assert load_train_config([f"attention={name}", DEEPSEEKS_YARN]).attention["rope_scaling"]["mscale_all_dim"] == 1.0
    older = dataclasses.replace(
        config,
        attention=config.attention
        | {"rope_scaling": load_train_config(["attention=gqa", DEEPSEEKS_YARN]).attention["rope_scaling"]},
    )
    save_run_config(older, tmp_path)
    assert load_run_config(tmp_path) == older


# --- what a run is called --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("", "wikitext2-tiny-mha-seed0"),
        ("attention=mla seed=3", "wikitext2-tiny-mla-seed3"),
        ("seed=3 data_seed=1", "wikitext2-tiny-mha-seed3-data1"),
        ("attention.n_kv_heads=2 attention=gqa", "wikitext2-tiny-gqa-seed0"),  # gqa's own value: nothing differs
        ("attention=gqa attention.n_kv_heads=1", "wikitext2-tiny-gqa-n_kv_heads=1-seed0"),
        ("tokenizer=bytes tracking=none device=cpu", "wikitext2-tiny-mha-bytes-seed0"),
        ("parallel=fsdp parallel.reshard_after_forward=false", "wikitext2-tiny-mha-seed0"),
        ("tokenizer=bpe optimizer=adamw", "wikitext2-tiny-mha-seed0"),
        ("optimizer=muon schedule=wsd", "wikitext2-tiny-mha-muon-wsd-seed0"),
        ("budget.tokens=5e5 optimizer.lr=1e-3", "wikitext2-tiny-mha-tokens=500000-lr=0.001-seed0"),
        ("budget.tokens=5 budget.tokens=6", "wikitext2-tiny-mha-tokens=6-seed0"),
        ("attention=mla attention.q_lora_rank=null", "wikitext2-tiny-mla-seed0"),
        ("optimizer.betas=[0.9,0.99]", "wikitext2-tiny-mha-betas=_0.9,_0.99_-seed0"),
        ("dataset=local dataset.path=/my/long/road.txt", "local_road_b84997-tiny-mha-seed0"),
        ("experiment=books_tiny", "classic_books-tiny-mha-books_tiny-seed0"),
        ("experiment=null", "wikitext2-tiny-mha-seed0"),
        ("budget={tokens:99000}", "wikitext2-tiny-mha-tokens=99000-seed0"),
        ("dataset.max_tokens=9000", "wikitext2-tiny-mha-dataset.max_tokens=9000-seed0"),
        ("evaluation.max_tokens=9000", "wikitext2-tiny-mha-evaluation.max_tokens=9000-seed0"),
        ("attention.dropout=0.1", "wikitext2-tiny-mha-attention.dropout=0.1-seed0"),
    ],
)
def test_the_default_name_carries_what_differs(line: str, name: str) -> None:
    overrides = [*filter(None, split(line))]
    given = [] if any(override.startswith(("dataset=", "experiment=b")) for override in overrides) else PLAIN[:1]
    assert load_train_config([*given, *overrides]).name == name


def test_a_long_name_is_cut_and_stays_unique_and_keeps_the_seed() -> None:
    lines = [
        [
            f"attention.{knob}={value}"
            for knob, value in (
                ("kv_lora_rank", rank),
                ("qk_nope_head_dim", 30),
                ("qk_rope_head_dim", 8),
                ("v_head_dim", 20),
                ("latent_scale", "true"),
                ("fused_down_projections", "true"),
            )
        ]
        for rank in (20, 22)
    ]
    names = [load_train_config(["attention=mla", *line, "seed=7"]).name for line in lines]
    assert len(set(names)) == 2
    for name in names:
        assert len(name) < 100 and name.endswith("-seed7") and "-tiny-mla-fused_down_projections=true-kv_lora_rank=2" in name


def test_a_name_of_ones_own_is_taken_as_it_is() -> None:
    assert load_train_config(["name=a_b=c,d+e.f-1"]).name == "a_b=c,d+e.f-1"


def test_the_name_and_the_configuration_do_not_depend_on_the_order_of_fields() -> None:
    lines = itertools.permutations(["attention=mla", "seed=1", "model.n_layers=2"])
    configs = [load_train_config([*PLAIN[:1], *line]) for line in lines]
    assert all(config == configs[0] for config in configs)


# --- text that needs no quotes ---------------------------------------------------------------------------------------

TEXTS = [
    "a, b",
    "a b",
    "a=b",
    "f(x)",
    "[1, 2]",
    "{a: b}",
    "it's",
    'say "so"',
    "${model.d_model}",
    "back\\slash",
    "#1 %2 @3",
    "a:b",
    "~/x",
    "*.txt",
    "réef 海",
    "true",
    "3",
    "'half",
    "-m",
    "trailing\\",
]


def test_a_sweep_is_the_product_of_its_lists_in_the_order_of_hydras_own() -> None:
    jobs = sweep_jobs(["attention=glob(m*a)", "optimizer.lr=0.1,2", "seed=range(0,2)", "name='a,b'"])
    product = itertools.product(("mfa", "mha", "mla", "mqa"), ("0.1", "2"), ("0", "1"))
    assert jobs == [[f"attention={a}", f"optimizer.lr={lr}", f"seed={seed}", "name='a,b'"] for a, lr, seed in product]


@pytest.mark.parametrize("text", TEXTS)
def test_free_text_reaches_the_configuration_as_it_was_typed(text: str) -> None:
    config = load_train_config(["name=run", "dataset=local", f"dataset.path=/data/{text}", f"tracking.notes={text}"])
    assert (config.dataset.path, config.tracking.notes) == (f"/data/{text}", text)
    assert load_eval_config([f"run={text}", "dataset=local", f"dataset.path={text}"]).run == text


@pytest.mark.parametrize("text", TEXTS)
def test_free_text_reaches_a_script_as_it_was_typed(text: str) -> None:
    @dataclasses.dataclass
    class Options:
        prompt: str = ""
        run: str | None = None

    assert parse_options(Options, [f"prompt={text}", f"run={text}"]) == Options(prompt=text, run=text)


def test_the_default_name_of_a_run_is_positional_though_it_holds_an_equals_sign() -> None:
    @dataclasses.dataclass
    class Options:
        runs: list[str] = dataclasses.field(default_factory=list)
        caches: str = "plain"

    names = ["stdlib-tiny-mla-tokens=100000-seed0", "a/b=c", "plain"]
    assert parse_options(Options, [*names, "caches=all"], positional="runs") == Options(names, "all")
    with pytest.raises(UserError, match=r"cache is not an option here; did you mean caches\?"):
        parse_options(Options, ["cache=all"], positional="runs")


def test_a_value_given_to_a_group_is_hinted_at_the_option_that_takes_it() -> None:
    for given, sentence in {
        "cache=int8": "cache is not an option here; did you mean cache.dtype=int8?",
        "cache=-1": "cache is not an option here; it is a group of cache.dtype, cache.window, cache.sinks",
    }.items():
        with pytest.raises(UserError) as refused:
            parse_options(DownstreamOptions, [given])
        assert str(refused.value) == sentence
    with pytest.raises(UserError, match=r'^limit="3" must be a whole number, without quotes$'):
        parse_options(DownstreamOptions, ['limit="3"'])
    with pytest.raises(UserError, match=r"^cache.dtype=null is unknown; choose one of float32, "):
        parse_options(GenerateOptions, ["cache.dtype=null"])


def test_whole_numbers_of_a_list_are_different_and_large_enough() -> None:
    assert whole_numbers("seeds", "3,0,12", least=0) == [3, 0, 12]
    for text in ("", "1,", "1, 2", "x", "1.5", "1,1", "0", "-1", "٣"):
        with pytest.raises(UserError, match=f"^contexts={text} must be (different )?whole numbers "):
            whole_numbers("contexts", text)


def test_text_that_was_quoted_for_hydra_is_not_quoted_again() -> None:
    assert quoted("dataset.path='a, b'") == "dataset.path='a, b'"
    assert load_train_config(["name=run", "dataset=local", "dataset.path='/a, b'"]).dataset.path == "/a, b"
    assert quoted("dataset.path=null") == "dataset.path=null"
    assert quoted("optimizer.lr=0.1") == "optimizer.lr=0.1"


def test_a_local_corpus_is_known_by_its_whole_path_and_so_are_all_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT / "tests")
    assert train("dataset=local", "dataset.path=a b.txt").dataset.path == str(ROOT / "tests" / "a b.txt")
    assert train("dataset=local").dataset.path is None
    assert train("dataset=classic_books", "dataset.path=books").dataset.path == str(ROOT / "tests" / "books")
    assert load_eval_config(["dataset=local", "dataset.path=a.txt"]).dataset.path == str(ROOT / "tests" / "a.txt")
    pretrained = ["tokenizer=pretrained"]
    assert train(*pretrained, "tokenizer.path=conftest.py").tokenizer.path == str(ROOT / "tests" / "conftest.py")
    assert train(*pretrained, "tokenizer.path=gpt2").tokenizer.path == "gpt2"  # a name on the hub


def test_equal_names_of_local_corpora_in_two_places_make_two_names_of_runs() -> None:
    names = {
        load_train_config(["dataset=local", f"dataset.path={path}"]).name
        for path in ("/a/texts", "/b/texts", "/a/*.md", "/a/*.txt")
    }
    assert len(names) == 4


def test_the_order_of_overrides_does_not_change_the_name() -> None:
    line = ["attention=mla", "optimizer.lr=0.1", "budget.steps=7", "tokenizer=bytes", "optimizer=muon"]
    assert len({load_train_config([*order, "dataset=stdlib"]).name for order in (line, line[::-1])}) == 1


def test_every_field_of_free_text_exists_where_it_is_read() -> None:
    fields = {path for schema in configuration.SCHEMAS.values() for path, _ in fields_below(schema)}
    of_scripts = {"prompt", "path", "runs", "to", "source", "out"}
    assert set(FREE_TEXT) <= fields | of_scripts


# --- a choice of this machine ----------------------------------------------------------------------------------------

LOCAL = "# @package _global_\ndefaults:\n  - override /dataset: stdlib\n"


def test_the_local_choice_is_the_default_and_the_command_line_and_experiments_override_it(tmp_path: Path) -> None:
    project = copy_project(tmp_path / "project")
    (project / "configs" / "local").mkdir()
    (project / "configs" / "local" / "default.yaml").write_text(LOCAL)
    lines = [[], ["dataset=tinystories"], ["experiment=books_tiny"], ["experiment=books_tiny", "dataset=wikitext2"]]
    code = (
        "import json, sys; from harness.config.compose import load_train_config; "
        "print(json.dumps([load_train_config(line).dataset.name for line in json.loads(sys.argv[1])]))"
    )
    command = [sys.executable, "-c", code, json.dumps(lines)]
    shown = subprocess.run(command, cwd=project, check=True, capture_output=True, text=True).stdout
    assert json.loads(shown) == ["stdlib", "tinystories", "classic_books", "wikitext2"]


def test_default_name_is_the_loaders() -> None:
    config = train("attention=mla")
    assert default_name(config, ["dataset=wikitext2", "attention=mla"]) == "wikitext2-tiny-mla-seed0"


def test_a_number_of_thousands_of_digits_is_refused_wherever_it_stands() -> None:
    default = dataclasses.asdict(load_train_config(["attention=mla"]))
    for group in (key for key, value in default.items() if isinstance(value, dict)):
        for field in default[group]:
            with pytest.raises(UserError, match="a number of thousands of digits"):
                train_config(default | {group: default[group] | {field: 10**5000}})


def test_the_home_folder_may_be_written_as_a_tilde_wherever_a_path_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No shell replaces it behind key=, and a folder of that name is one that nobody dares to remove."""
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = ["runs_dir=~/runs", "data_dir=~/data", "dataset=local", "dataset.path='~/a text'", "tokenizer=pretrained"]
    container = compose("train", [*paths, "tokenizer.path=~/tokenizer.json", "tracking.notes=~/n"])
    assert (container["runs_dir"], container["data_dir"]) == (f"{tmp_path}/runs", f"{tmp_path}/data")
    assert container["dataset"]["path"] == f"{tmp_path}/a text"
    assert container["tokenizer"]["path"] == f"{tmp_path}/tokenizer.json"
    assert container["tracking"]["notes"] == "~/n"  # which is no path
    assert compose("eval", ["data_dir=~/data"])["data_dir"] == f"{tmp_path}/data"
