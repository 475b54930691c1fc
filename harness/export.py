"""A run as a folder that stock transformers, and what is built on it, loads with no code of ours where it has the class.

What no stock class computes becomes a folder of our own class, which transformers loads after harness.huggingface.register().

    config.json  generation_config.json  model.safetensors      harness/huggingface.py
    tokenizer.json  tokenizer_config.json                       the run's tokenizer; plain bytes too are a fast tokenizer
    README.md                                                   the model card, with the run's figures

The folder is written aside, loaded again, compared with the run and only then renamed.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from harness import huggingface
from harness.data.tokenizer import END_OF_TEXT
from harness.errors import UserError
from harness.run import finished, read_json, write_json
from harness.session import TrainedModel, load_trained
from modeling.attention import EXECUTION

KINDS = ("auto", "stock", "own")
LARGEST_DIFFERENCE = 1e-5  # of the logits, relative to their size, float32
# What tokenizers get wrong: two spaces, accents, several bytes a character, and a special token that is only text.
_SAMPLE = f"The captain's  ship,\n\tnaïve 中文 \N{SLIGHTLY SMILING FACE} 1234 {END_OF_TEXT} end"


@dataclass
class Exported:
    """What was written where. difference: ||ours - theirs|| / ||theirs|| of the logits, float32.

    own: it is of our own class. misfits: what of the run no stock class has.
    """

    folder: Path
    architecture: str
    parameters: int
    difference: float
    own: bool
    misfits: list[str]

    @property
    def why_own(self) -> str:
        """The reason, as the rest of a sentence."""
        return f"because no stock one has {' and '.join(self.misfits)}" if self.misfits else "as it was asked for"


def export_run(run: Path, target: Path, *, kind: str = "auto") -> Exported:
    """Write the newest checkpoint of `run` to the folder `target`, in float32.

    kind: of a `stock` class, of our `own`, or `auto`: stock where one computes the same. Raises UserError when `target`
    exists and is not an empty folder, when the run holds no checkpoint, when kind=stock and no stock class computes what it
    does, and when what was written does not give the run's logits or tokens; then `target` is as before.
    """
    if kind not in KINDS:
        raise UserError(f"kind={kind} is unknown; choose {', '.join(KINDS[:-1])} or {KINDS[-1]}")
    check_target(target)
    trained = load_trained(run, device=torch.device("cpu"), precision=torch.float32, execution=EXECUTION)
    misfits = huggingface.misfits(trained.config)
    own = kind == "own" or (kind == "auto" and bool(misfits))
    if own:
        huggingface.register()
    theirs = (huggingface.as_own if own else huggingface.as_transformers)(trained.model, trained.config)
    exported = Exported(target, type(theirs).__name__, theirs.num_parameters(), 0.0, own, misfits)
    aside = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        aside.mkdir(parents=True)
        _check_room(aside, sum(parameter.nbytes for parameter in theirs.parameters()))
        huggingface.save(theirs, aside, trained.tokenizer.end_of_text)
        _write_tokenizer(trained, aside)
        exported.difference = _verify(trained, aside)
        (aside / "README.md").write_text(model_card(run, trained, exported), encoding="utf-8")
        for weights in aside.glob("*.safetensors"):  # written for the owner's eyes only
            shutil.copymode(aside / "config.json", weights)
        os.replace(aside, target)
    except OSError as error:
        raise UserError(f"to={target} cannot be written ({error.strerror}): choose another folder") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return exported


def check_target(target: Path) -> None:
    """Raises UserError unless the folder is absent or empty."""
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"to={target} exists and is no empty folder: choose another one, or remove it first")


def _check_room(folder: Path, tensor_bytes: int) -> None:
    needed, free = tensor_bytes + 2**24, shutil.disk_usage(folder).free  # tokenizer, JSON
    if free < needed:
        raise UserError(f"the export needs {needed:,} bytes and the disk has {free:,} free: choose another folder")


def _verify(trained: TrainedModel, folder: Path) -> float:
    """The relative difference of the logits. Raises UserError where the folder is not the run."""
    model, tokenizer = huggingface.load(folder)
    difference = huggingface.difference(trained.model, model)
    if not difference <= LARGEST_DIFFERENCE:
        raise UserError(
            f"the exported logits differ from the run's by {difference:.1e} of their size, more than "
            f"{LARGEST_DIFFERENCE:.0e}: nothing was written"
        )
    # verbose: it would warn that the sample is longer than the context of a small model.
    if tokenizer(_SAMPLE, verbose=False)["input_ids"] != trained.tokenizer.encode(_SAMPLE):
        raise UserError(
            "the exported tokenizer gives other tokens than the run's: nothing was written; retrain with tokenizer=bpe"
        )
    return difference


def _write_tokenizer(trained: TrainedModel, folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json, set to encode as the run did: nothing added, special tokens as text."""
    if trained.tokenizer_file is None:
        specification = bytes_tokenizer(trained.tokenizer.end_of_text)
    else:
        specification = read_json(trained.tokenizer_file)
    if (specification["post_processor"] or {}).get("type") != "ByteLevel":  # which adds no tokens, the others may
        specification["post_processor"] = None
    # Not write_json: its names of characters would make the file six times as long.
    text = json.dumps(specification, ensure_ascii=False, indent=2)
    (folder / "tokenizer.json").write_text(text + "\n", encoding="utf-8")
    end_of_text = _token(specification, trained.tokenizer.end_of_text)
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end_of_text, "pad_token": end_of_text,
        "model_max_length": trained.model.max_seq_len, "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False, "split_special_tokens": True,
    })  # fmt: skip


def bytes_tokenizer(end_of_text: int) -> dict[str, Any]:
    """Plain bytes as a tokenizer.json: a byte-level BPE with no merges, in which each byte's stand-in has the byte as id.

    The stand-ins are GPT-2's: printable characters of Latin-1 stand for themselves, the other bytes, in order, for the
    characters from 256 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    vocabulary = {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "pre_tokenizer": level,
        "added_tokens": [{
            "id": end_of_text, "content": END_OF_TEXT, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": True,
        }],
        "post_processor": None, "decoder": level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": dict(sorted(vocabulary.items(), key=lambda item: item[1])), "merges": [],
        },
    }  # fmt: skip


def _token(specification: dict[str, Any], number: int) -> str:
    """The text of a token of a tokenizer.json."""
    added = {token["id"]: token["content"] for token in specification["added_tokens"]}
    if number in added:
        return str(added[number])
    vocabulary = specification["model"]["vocab"]
    if isinstance(vocabulary, dict):
        return next(str(text) for text, index in vocabulary.items() if index == number)
    return str(vocabulary[number][0])  # a unigram model lists [text, score]


def model_card(run: Path, trained: TrainedModel, exported: Exported) -> str:
    """README.md: what the model is, how to load it, and the figures in summary.json and evaluations/."""
    config = trained.config
    attention = config.attention
    rows = [
        ("class", f"`{exported.architecture}`, float32"),
        ("attention", attention["name"]),
        ("shape", f"{config.model.n_layers} layers, d_model {config.model.d_model}, {config.model.n_heads} heads, "
         f"context {config.model.max_seq_len:,} tokens"),
        ("cached per token and layer", _cached(attention)),
        ("parameters", f"{exported.parameters:,}"),
        ("vocabulary", f"{trained.tokenizer.vocab_size:,} ({config.tokenizer.name})"),
        ("trained on", config.dataset.name),
        ("checkpoint", f"step {trained.step:,}"),
        ("logits against the run's", f"relative difference {exported.difference:.1e}"),
    ]  # fmt: skip
    if finished(run):
        summary = read_json(run / "summary.json")
        rows.append(("training tokens", f"{summary['tokens']:,}"))
        rows.append(("cache per token, all layers", f"{summary['cache_bytes_per_token']:,} bytes "
                     f"({summary['cache_dtype']})"))  # fmt: skip
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "---", "", f"# {config.name}", ""]
    lines += ["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows), ""]
    lines += _figures(run)
    use = ["```python", "from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    if exported.own:
        use = [
            f"The class is our own, {exported.why_own}. This folder holds no code: transformers knows the class once the "
            "project that trained the model can be imported (start Python in its folder, or add that to PYTHONPATH) and "
            "`register()` has been called. No trust_remote_code is needed.", "", "```python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
            "from harness.huggingface import register", "", "register()",
        ]  # fmt: skip
    lines += [
        "## Use", "", *use,
        f'model = AutoModelForCausalLM.from_pretrained("{exported.folder.name}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{exported.folder.name}")', 'inputs = tokenizer("The sea",'
        ' return_tensors="pt")', "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))", "```", "",
        "The tokenizer adds no token of its own and takes special tokens in a text for the characters that they are. "
        "Training documents were separated by the end-of-text token: a prompt of that token alone begins a new one.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _cached(attention: dict[str, Any]) -> str:
    """What a layer keeps of each token, in words."""
    rotated = attention["qk_rope_head_dim"]
    if attention["mechanism"] == "mla":
        rank, group = attention["kv_lora_rank"], attention["sharing_layers"]
        where = f", in the first of every {group} layers" if attention["sharing"] == "latent" else ""
        return f"{rank + rotated} elements (latent {rank} + rotated key {rotated}){where}"
    keys, values, heads = attention["head_dim"], attention["v_head_dim"], attention["n_kv_heads"]
    widths = f"{keys}" if keys == values else f"{keys} and {values}"
    shared = f" + rotated key {rotated}" if rotated else ""
    return f"{heads * (keys + values) + rotated} elements ({heads} key/value heads of {widths}{shared})"


def _figures(run: Path) -> list[str]:
    """A table of the run's scores: its last validation and every evaluation."""
    if not finished(run):
        return ["The run had not finished training when it was exported: it has no final figures.", ""]
    scores = [read_json(run / "summary.json"), *map(read_json, sorted((run / "evaluations").glob("*.json")))]
    lines = [
        "## Figures", "", "| dataset | split | tokens | loss (nats) | perplexity | bits per byte | scored |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for score in scores:
        bits = "" if score["bits_per_byte"] is None else f"{score['bits_per_byte']:.4f}"
        how = ["per document" if score["per_document"] else "in windows"]
        if score.get("through_cache"):
            how.append(f"through a cache of {score['cache_dtype']}")
        if score.get("cache_window") is not None:
            how.append(f"of the newest {score['cache_window']:,} positions")
        lines.append(
            f"| {score['dataset']} | {score['split']} | {score['evaluated_tokens']:,} | {score['loss']:.4f} | "
            f"{score['perplexity']:.3f} | {bits} | {', '.join(how)} |"
        )
    return [*lines, ""]
