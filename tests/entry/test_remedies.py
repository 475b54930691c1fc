"""A sentence's remedy works: each mistake is made for real, what is said of it is done word for word, and it goes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import eval_model
import train_model
from harness.config.build import build_model
from harness.config.compose import load_train_config
from harness.errors import UserError
from scripts import check_attention, compare_runs, convert, generate, kv_calculator, prepare_data, run_study
from tests.support.micro import Workplace

# The command, the mistake, a part of what is said, and what it says to do: arguments that take the place of those of the
# same name, `-name` for one that is left out.
REMEDIES: list[tuple[str, list[str], str, list[str]]] = [
    ("model", ["model.vocab_size=100"], "leave it out", ["-model.vocab_size"]),
    ("model", ["attention=gqa", "attention.n_kv_heads=3"], "choose one of [1, 2]", ["attention.n_kv_heads=2"]),
    ("model", ["attention=mla", "attention.kv_lora_rank=400"], "16 would", ["attention.kv_lora_rank=16"]),
    (
        "model",
        ["attention=mla", "attention.kv_lora_rank=65", "attention.kv_latent=split"],
        "64 for instance",
        ["attention.kv_lora_rank=64"],
    ),
    (
        "model",
        ["attention=mla", "attention.kv_lora_rank=31", "attention.kv_latent=split"],
        "30 for instance",
        ["attention.kv_lora_rank=30"],
    ),
    ("model", ["attention=mla", "attention.q_lora_rank=400"], "at most 32", ["attention.q_lora_rank=32"]),
    ("model", ["attention=mla", "attention.q_lora_rank=400"], "null for none", ["attention.q_lora_rank=null"]),
    (
        "model",
        ["attention=mla", "attention.positions=rope_after_up"],
        "exactly when positions=decoupled",
        ["attention.positions=decoupled"],
    ),
    (
        "model",
        ["attention=mla", "attention.latent=frozen", "attention.fused_down_projections=true"],
        "set fused_down_projections=false",
        ["attention.fused_down_projections=false"],
    ),
    ("model", ["attention=mla", "attention.decode=absorb"], "choose auto or expand", ["attention.decode=expand"]),
    ("model", ["attention=mha", "attention.head_dim=15"], "choose an even head_dim", ["attention.head_dim=14"]),
    (
        "model",
        ["attention=mha_learned", "attention.rope_scaling={rope_type:linear,factor:2}"],
        "leave it out",
        ["-attention.rope_scaling"],
    ),
    (
        "model",
        ["attention=mha", "attention.rope_scaling={rope_type:linear}"],
        "its fields are factor",
        ["attention.rope_scaling={rope_type:linear,factor:2}"],
    ),
    ("model", ["model.mlp=tanh"], "choose from relu2, swiglu", ["model.mlp=relu2"]),
    ("model", ["model.max_seq_len=0"], "must be 1 or more", ["model.max_seq_len=1"]),
    ("model", ["micro_batch_size=3"], "choose a divisor", ["micro_batch_size=2"]),
    ("model", ["tracking.project=a=b"], "quote values", ["tracking.project='a=b'"]),
    ("model", ["dataset.text_column={a"], "quote values", ["dataset.text_column='{a'"]),
    ("model", ["seed"], "write seed=value", ["-seed", "seed=3"]),
    ("model", ["--seed=1"], "write seed=1", ["---seed", "seed=1"]),
    ("model", ["~tracking"], "write tracking=none", ["-~tracking", "tracking=none"]),
    ("model", ["optimizer.betas=0.9"], "must be a list like [a, b]", ["optimizer.betas=[0.9,0.95]"]),
    ("model", ["schedule=cosin"], "did you mean cosine?", ["schedule=cosine"]),
    ("train", ["optimizer.betas=[1,2]"], "such as [0.9, 0.95]", ["optimizer.betas=[0.9,0.95]"]),
    ("train", ["spikes.sigma=0"], "such as 6", ["spikes.sigma=6"]),
    ("train", ["optimizer.muon_lr=0.02"], "leave them out", ["-optimizer.muon_lr"]),
    ("train", ["schedule.decay_fraction=0.2"], "choose schedule=wsd", ["schedule=wsd"]),
    ("train", ["schedule=wsd", "schedule.decay_fraction=0"], "0.2 is common", ["schedule.decay_fraction=0.2"]),
    ("train", ["budget.steps=1", "schedule.final_lr_fraction=0"], "raise the budget", ["budget.steps=2"]),
    (
        "train",
        ["budget.tokens=10", "budget.steps=null"],
        "step of 128 tokens (batch_size x max_seq_len): raise budget.tokens",
        ["budget.tokens=128"],
    ),
    ("train", ["budget.tokens=1000"], "give one", ["budget.steps=null"]),
    ("train", ["attention=mla", "attention.kernel=triton"], "take attention.kernel=torch", ["attention.kernel=torch"]),
    ("train", ["attention.backend=sdpa_cudnn"], "attention.backend=auto picks", ["attention.backend=auto"]),
    ("train", ["capture=on"], "leave capture=auto", ["capture=auto"]),
    ("train", ["name=h", "attention=mha"], "overwrite=true", ["overwrite=true"]),
    (
        "train",
        ["dataset.validation_fraction=0"],
        "set dataset.validation_fraction above 0",
        ["dataset.validation_fraction=0.1"],
    ),
    (
        "train",
        ["dataset.path=@/nested.jsonl", "dataset.text_column=body"],
        "(its fields: body.text)",
        ["dataset.text_column=body.text"],
    ),
    (
        "train",
        ["dataset=mqar", "dataset.synthetic_documents=500", "dataset.path=@/sea.txt"],
        "leave it out",
        ["dataset.path=null"],
    ),
    ("train", ["init_from=@/runs/r", "model.n_layers=2"], "leave that out", ["-model.n_layers"]),
    ("eval", ["run=r", "cache.sinks=2"], "set cache.window", ["cache.window=8"]),
    ("eval", ["run=r", "cache.window=33"], "choose a shorter one", ["cache.window=32"]),
    ("eval", ["run=r", "stride_fraction=2"], "at most 1", ["stride_fraction=1"]),
    ("eval", ["run=g", "attention.decode=absorbed"], "choose auto", ["attention.decode=auto"]),
    ("eval", ["run=r", "dataset=local"], "needs dataset.path: a file", ["dataset.path=@/sea.txt"]),
    ("generate", ["run=r", "prompt=hi", "max_new_tokens=400"], "at most 31 new tokens", ["max_new_tokens=31"]),
    ("generate", ["run=r", "max_new_tokens=3", "temperature=1e-9"], "from 0.001", ["temperature=0.001"]),
    ("generate", ["run=r", "max_new_tokens=3", "step=graph"], "take step=compile or step=eager", ["step=eager"]),
    ("generate", ["run=r", "max_new_tokens=3", "prompt"], "write prompt=...", ["-prompt", "prompt=hi"]),
    ("generate", ["run=r", "--max-new-tokens=3"], "write max_new_tokens=3", ["---max-new-tokens", "max_new_tokens=3"]),
    ("generate", ["run=r", "max_new_tokens=3", "cache.sinks=4"], "sinks need a window", ["cache.window=8"]),
    ("compare", ["evaluation=x", "split=validation"], "leave out split=...", ["-evaluation", "split=validation"]),
    ("compare", ["evaluation=x"], "there are: local-test-", ["evaluation=max_tokens=None"]),
    ("convert", ["run=g", "method=transmla", "kv_lora_rank=160", "qk_rope_head_dim=8"], "choose 1 to 32", ["kv_lora_rank=32"]),
    ("convert", ["run=g", "method=transmla", "qk_rope_head_dim=8"], "give kv_lora_rank=N", ["kv_lora_rank=16"]),
    (
        "convert",
        ["run=g", "method=mha2mla", "kv_lora_rank=12", "qk_rope_head_dim=3"],
        "a multiple of 4",
        ["qk_rope_head_dim=4"],
    ),
    ("convert", ["run=g", "method=gqa_mean", "n_kv_heads=3"], "choose a divisor of 2", ["n_kv_heads=1"]),
    ("convert", ["run=g", "method=exact", "kv_lora_rank=3"], "leave it out", ["-kv_lora_rank"]),
    ("calculator", ["config=@/runs/r"], "write run=", ["-config", "run=@/runs/r"]),
    ("calculator", ["run=@/runs/r", "context=much"], "as 32768 or 128k", ["context=128k"]),
    ("calculator", ["attention=mla", "dtype=int44"], "did you mean int4?", ["dtype=int4"]),
    ("check", ["attention=mlaa"], "did you mean mla?", ["attention=mla"]),
    ("prepare", ["dataset=local"], "needs dataset.path: a file", ["dataset.path=@/sea.txt"]),
    ("study", ["study=demo", "dryrun=true"], "did you mean dry_run?", ["-dryrun", "dry_run=true"]),
    (
        "study",
        ["study=demo", "dry_run=true", "tokenizer=pretrained", "tokenizer.path=someone/some"],
        "name that, or its folder, with tokenizer.path=",
        ["tokenizer.path=@/tokenizer.json"],
    ),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    from harness.data import Tokenizer

    place = Workplace(tmp_path_factory.mktemp("remedies"))
    lines = (json.dumps({"body": {"text": f"document {number} tells of {7 * number} whales"}}) for number in range(300))
    (place.folder / "nested.jsonl").write_text("\n".join(lines))
    tokenizer = Tokenizer.train_bpe([place.corpus.read_text()], 300)
    tokenizer.save(place.folder)
    place.train("r", "attention=mla")
    place.train("g", "attention=gqa")
    place.train("h", "attention=gqa", "budget.steps=1")
    assert place.evaluate("run=all", "extras=[]") == 0
    return place


def commands(place: Workplace, number: int) -> dict[str, Callable[[list[str]], object]]:
    places = {"data": f"data_dir={place.folder / 'data'}", "runs": f"runs_dir={place.runs}"}

    def model(arguments: list[str]) -> int:
        build_model(load_train_config(place.overrides(*arguments)), 257)
        return 0

    def train(arguments: list[str]) -> int:
        named = [] if any(argument.startswith("name=") for argument in arguments) else [f"name=remedy-{number}"]
        return train_model.main(place.overrides(*named, *arguments))

    def studied(arguments: list[str]) -> int:
        local = ["dataset=local", f"dataset.path={place.corpus}", places["data"], "device=cpu", "tracking=none"]
        dry = [] if "dry_run=true" in arguments else ["dry_run=true"]
        return run_study.main([*local, *dry, f"runs_dir={place.folder / 'studies'}", *arguments])

    return {
        "model": model,
        "train": train,
        "eval": lambda arguments: eval_model.main([*place.places(), "extras=[]", *arguments]),
        "generate": lambda arguments: generate.main([places["runs"], "device=cpu", *arguments]),
        "compare": lambda arguments: compare_runs.main(
            [str(place.runs / "r"), str(place.runs / "g"), "tracking=none", f"out={place.folder / 'out'}", *arguments]
        ),
        "convert": lambda arguments: convert.main(
            [places["runs"], places["data"], "device=cpu", f"to={place.runs / f'made-{number}'}", *arguments]
        ),
        "calculator": kv_calculator.main,
        "check": check_attention.main,
        "prepare": lambda arguments: prepare_data.main([places["data"], *arguments]),
        "study": studied,
    }


def obeyed(mistake: Sequence[str], remedy: Sequence[str]) -> list[str]:
    """The arguments after the remedy: what it leaves out is gone, what it sets takes the place of what was set."""
    gone = {word[1:] for word in remedy if word.startswith("-")}
    new = [word for word in remedy if not word.startswith("-")]
    replaced = gone | {word.partition("=")[0] for word in new}
    return [*(word for word in mistake if word.partition("=")[0] not in replaced), *new]


@pytest.mark.parametrize("number", range(len(REMEDIES)), ids=lambda number: f"{number}-{REMEDIES[number][1][-1]}")
def test_what_a_sentence_says_to_do_works(place: Workplace, number: int) -> None:
    command, mistake, said, remedy = REMEDIES[number]
    call = commands(place, number)[command]
    here = str(place.folder)
    with pytest.raises(UserError) as refused:
        call([word.replace("@", here) for word in mistake])
    sentence = str(refused.value)
    assert said in sentence
    for word in remedy:
        option = word.lstrip("-~").partition("=")[0].replace("-", "_").rpartition(".")[2]
        assert option in sentence.replace("-", "_") or said == "raise the budget", (option, sentence)
    assert call([word.replace("@", here) for word in obeyed(mistake, remedy)]) == 0


def test_a_flag_of_another_script_is_not_advised(tmp_path: Path) -> None:
    for main in (check_attention.main, generate.main):
        with pytest.raises(UserError, match=r"^--cfg is not an option here; "):
            main(["--cfg", "job"])
