"""A run as a folder that stock transformers, and what is built on it, loads with no code of ours where it has the class.

What no stock class computes becomes a folder of our own class, which transformers loads after harness.hf.classes.register().

    config.json  generation_config.json  model.safetensors      harness/hf/classes.py
    tokenizer.json  tokenizer_config.json                       the run's tokenizer; plain bytes too are a fast tokenizer
    README.md                                                   the model card, with the run's figures

The folder is written at a temporary path, loaded again, compared with the run and only then renamed.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from harness.data.tokenizer import END_OF_TEXT, Tokenizer, bytes_specification
from harness.errors import UserError
from harness.evaluation.metric import SCORES
from harness.files.atomic import check_room, check_target, new_folder, read_json, write_json
from harness.files.text import markdown, markdown_row
from harness.hf import classes
from harness.runs.folder import finished
from harness.runs.load import TrainedModel, load_trained
from harness.runs.records import read_evaluations, read_summary
from modeling.attention import EXECUTION
from modeling.gpt import GPT

KINDS = ("auto", "stock", "own")
LARGEST_DIFFERENCE = 1e-5  # of the logits, relative to their size, float32
# What tokenizers get wrong. transformers builds some by the model's type, whatever tokenizer.json says: with a normalizer
# (e + U+0301 becomes one character), another treatment of digits, spaces or contractions.
_HARD_TEXTS = (
    f"The captain's  ship,\n\tnaïve 中文 \N{SLIGHTLY SMILING FACE} 1234 {END_OF_TEXT} end",
    "e\u0301 and é, A\u030a and Å, \u1100\u1161\u11a8 and 각, \ufb01 and fi, \u2126 and Ω, \u0344",
    "0 00 007 12345678 3.14159 -1e-9 1,000,000 0x7f ½ x² ٣٤٥ १२३ １２３",
    " ",
    "  ",
    "   three, then\ttabs\t\t\tand \u00a0no-break\u2003em\u3000wide \u200bzero\ufeff",
    "trailing spaces   \n\n\n  \r\n\r\nlines\r \n \n",
    "\x00\x01\x7f\x80\x85\xa0\xad\u2028\u2029",
    "I'm you're he'll WE'D it's 'twas don’t O'Neil's",
    "snake_case camelCase HTTPServer2x a.b->c::d C++ #hash @at $5 50%",
    "def f(x):\n    if x != 0:\n\treturn {'a': [1, 2]}  # why\n\n</div><br/>&amp; \\n \\u0301 \"\\\\\"",
    "😀👍🏽👩‍👩‍👧‍👦🇨🇭❤️‍🔥 ☺︎☺️ 1️⃣",
    "Ελληνικά Русский عَرَبِيّ עִבְרִית हिन्दी ไทย 한국어 日本語カタカナ ქართული አማርኛ 𝔘𝔫𝔦 𒀀",
    "<s> </s> <unk> <pad> [CLS] [SEP] <|im_start|>user<|im_end|> <|eot_id|> <bos><eos> <0x0A> ▁x Ġx <｜end▁of▁sentence｜>",
    f"{END_OF_TEXT}{END_OF_TEXT}a{END_OF_TEXT} ",
    "ſ ß ẞ İ ı ŉ Ǆ ΐ ﷺ",
    "x" * 300,
    "aaaa bbbb  aaaa\nAAAA ÀÀÀÀ",
)
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_OWN_WORDS = 2_000  # tokens of the vocabulary, as text


@dataclass
class Exported:
    """What was written where. difference: ||ours - theirs|| / ||theirs|| of the logits, float32.

    own: it is of our own class. misfits: what of the run no stock class that we write has.
    """

    folder: Path
    architecture: str
    parameters: int
    difference: float
    own: bool
    misfits: list[str]
    dtype: str = "float32"

    @property
    def why_own(self) -> str:
        """The reason, as the rest of a sentence."""
        return f"because no stock one that we write has {' and '.join(self.misfits)}" if self.misfits else "as it was asked for"


def export_run(run: Path, target: Path, *, kind: str = "auto") -> Exported:
    """Write the newest checkpoint of `run` to the folder `target`, in float32, an import in its own dtype.

    kind: of a `stock` class, of our `own`, or `auto`: stock where one computes the same. Raises UserError when `target`
    exists and is not an empty folder, when the run holds no checkpoint, when kind=stock and no stock class computes what it
    does, and when what was written does not give the run's logits or tokens; then `target` is as before.
    """
    if kind not in KINDS:
        raise UserError(f"kind={kind} is unknown; choose {', '.join(KINDS[:-1])} or {KINDS[-1]}")
    check_target(target)
    trained = load_trained(run, device=torch.device("cpu"), precision=torch.float32, execution=EXECUTION)
    with new_folder(target) as temporary:
        _write_tokenizer(trained, temporary)
        theirs, misfits = _chosen(trained, temporary, kind)
        own = kind == "own" or bool(misfits)
        exported = Exported(target, type(theirs).__name__, theirs.num_parameters(), 0.0, own, misfits)
        weights = sum(parameter.nbytes for parameter in theirs.parameters())
        check_room(temporary, weights + 2**24, "the export", "choose another folder")  # tokenizer, JSON
        _take_their_dtype(trained, theirs)
        exported.dtype = str(theirs.dtype).removeprefix("torch.")
        classes.save_theirs(theirs, temporary, trained.tokenizer.stops, trained.tokenizer.begins)
        exported.difference = _verify(trained, temporary)
        (temporary / "README.md").write_text(model_card(run, trained, exported), encoding="utf-8")
        for file in temporary.glob("*.safetensors"):  # written for the owner's eyes only
            shutil.copymode(temporary / "config.json", file)
    return exported


def _chosen(trained: TrainedModel, folder: Path, kind: str) -> tuple[Any, list[str]]:
    """The model in a class of theirs beside which `folder`'s tokenizer is the run's, else in our own, and what no stock
    class has. Raises UserError for kind=stock where there is none."""
    misfits = classes.misfits(trained.config)
    if kind == "stock" or (kind == "auto" and not misfits):
        nearest: list[str | None] = [*classes.families(trained.config)] or [None]  # without one it is refused by name
        for family in nearest:
            theirs = classes.as_transformers(trained.model, trained.config, family)
            theirs.config.save_pretrained(folder)  # AutoTokenizer goes by it
            text = _text_encoded_otherwise(trained, classes.load_tokenizer(folder))
            if text is None:
                return theirs, []
        misfits = ["this tokenizer beside it"]
        if kind == "stock":
            raise UserError(
                f"transformers gives its {type(theirs).__name__} another tokenizer than the run's ({text!r} becomes other "
                f"tokens): take kind=auto, which writes a class of our own"
            )
    classes.register()
    return classes.as_own(trained.model, trained.config), misfits


def _verify(trained: TrainedModel, folder: Path) -> float:
    """The relative difference of the logits. Raises UserError where the folder is not the run."""
    model, tokenizer = classes.load(folder)
    difference = classes.difference(trained.model, model)
    if not difference <= LARGEST_DIFFERENCE:
        raise UserError(
            f"the exported logits differ from the run's by {difference:.1e} of their size, more than "
            f"{LARGEST_DIFFERENCE:.0e}: nothing was written"
        )
    text = _text_encoded_otherwise(trained, tokenizer)
    if text is not None:
        raise UserError(
            f"transformers reads the run's tokenizer.json otherwise ({text!r} becomes other tokens): nothing was written; "
            f"retrain with tokenizer=bpe"
        )
    return difference


def _text_encoded_otherwise(trained: TrainedModel, tokenizer: Any) -> str | None:
    """The first text of which the exported tokenizer makes other tokens, or other text of those, than the run's."""
    ours = trained.tokenizer
    order = torch.randperm(ours.vocab_size, generator=torch.Generator().manual_seed(0))[:_OWN_WORDS].tolist()
    words = [ours.decode(order[start : start + 100]) for start in range(0, len(order), 100)]
    for text in (*_HARD_TEXTS, *words):
        tokens = ours.encode_prompt(text)
        # verbose: it would warn that a text is longer than the context of a small model.
        if tokenizer(text, verbose=False)["input_ids"] != tokens and _twice(ours, tokenizer, text) != tokens:
            return text
        decoded = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if decoded != ours.decode(tokens):
            return text
    return None


def _twice(ours: Tokenizer, tokenizer: Any, text: str) -> list[int]:
    """Their tokens of a text that begins with what each text begins with: they put it there again, we do not."""
    tokens: list[int] = tokenizer(text, verbose=False)["input_ids"]
    begins = list(ours.begins)
    return tokens[len(begins) :] if tokens[: 2 * len(begins)] == 2 * begins else tokens


def _write_tokenizer(trained: TrainedModel, folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json, set to encode as the run did: nothing added, special tokens as text."""
    file, tokenizer = trained.tokenizer_file, trained.tokenizer
    specification = bytes_specification() if file is None else read_json(file)
    if trained.text is None and (specification["post_processor"] or {}).get("type") != "ByteLevel":  # others may add tokens
        specification["post_processor"] = None
    # Not write_json: its names of characters would make the file six times as long.
    text = json.dumps(specification, ensure_ascii=False, indent=2)
    (folder / "tokenizer.json").write_text(text + "\n", encoding="utf-8")
    names = {number: name for name, number in tokenizer.vocabulary.items()}
    end_of_text = names.get(tokenizer.end_of_text, END_OF_TEXT)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end_of_text,
        "pad_token": end_of_text,
        "model_max_length": trained.model.max_seq_len,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    if trained.text is None:
        config["split_special_tokens"] = True
    else:
        config |= trained.text.tokenizer_config
        if trained.text.chat_template is not None:
            config["chat_template"] = trained.text.chat_template
    write_json(folder / "tokenizer_config.json", config)


def _take_their_dtype(trained: TrainedModel, theirs: Any) -> None:
    """Back to the dtype that a checkpoint from elsewhere had, where that rounds nothing."""
    dtype = None if trained.text is None else _DTYPES.get(trained.text.dtype or "")
    if dtype is not None and all(torch.equal(p.to(dtype).to(p.dtype), p) for p in theirs.parameters()):
        theirs.to(dtype)


_CARD = """---
library_name: transformers
pipeline_tag: text-generation
---

# {name}

| | |
| --- | --- |
{rows}

{figures}
## Use

{before}```python
from transformers import AutoModelForCausalLM, AutoTokenizer
{register}
model = AutoModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
inputs = tokenizer("The sea", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))
```

{text}
"""


def model_card(run: Path, trained: TrainedModel, exported: Exported) -> str:
    """README.md: what the model is, how to load it, and the figures in summary.json and evaluations/."""
    before = register = ""
    if exported.own:
        before = (
            f"The class is our own, {exported.why_own}. This folder holds no code: transformers knows the class once the "
            "project that trained the model can be imported (start Python in its folder, or add that to PYTHONPATH) and "
            "`register()` has been called. No trust_remote_code is needed.\n\n"
        )
        register = "\nfrom harness.hf.classes import register\n\nregister()"
    text = (
        "The tokenizer adds no token of its own and takes special tokens in a text for the characters that they are. "
        "Training documents were separated by the end-of-text token: a prompt of that token alone begins a new one."
    )
    if trained.text is not None:
        text = "The tokenizer begins a text and takes special tokens in it as that of the checkpoint it comes from."
    return _CARD.format(
        name=markdown(trained.config.name),
        rows="\n".join(f"| {name} | {value} |" for name, value in _card_rows(run, trained, exported)),
        figures="\n".join(_figures(run)),
        before=before,
        register=register,
        folder=exported.folder.name,
        text=text,
    )


def _card_rows(run: Path, trained: TrainedModel, exported: Exported) -> list[tuple[str, str]]:
    """What the model is."""
    config, model = trained.config, trained.config.model
    readable = not exported.own and exported.architecture not in classes.SINCE_5
    reader = "; config.json has the fields that 4.57 reads too" if readable else ""
    rows = [
        ("class", f"`{exported.architecture}`, {exported.dtype}"),
        ("loads with", f"transformers {classes.version()}, which wrote it{reader}"),
        ("attention", markdown(config.attention["name"])),
        (
            "shape",
            f"{model.n_layers} layers, d_model {model.d_model}, {model.n_heads} heads, context {model.max_seq_len:,} tokens",
        ),
        ("cached per token and layer", _cached(trained.model)),
        ("parameters", f"{exported.parameters:,}"),
        ("vocabulary", f"{trained.tokenizer.vocab_size:,} ({markdown(config.tokenizer.name)})"),
        ("trained on", markdown(config.dataset.name)),
        ("checkpoint", f"step {trained.step:,}"),
        ("logits against the run's", f"relative difference {exported.difference:.1e}"),
    ]
    if finished(run):
        summary = read_summary(run, "tokens", "cache_bytes_per_token", "cache_dtype")
        cached = f"{summary['cache_bytes_per_token']:,} bytes ({markdown(summary['cache_dtype'])})"
        rows += [("training tokens", f"{summary['tokens']:,}"), ("cache per token, all layers", cached)]
    return rows


def _cached(model: GPT) -> str:
    """What a layer keeps of each token, in words; where layers differ, how many of them keep what."""
    kinds: Counter[str] = Counter()
    for attention in model.attentions:
        held = [(f"{attention.cache_formula:,} elements", attention.cache_shapes)] if attention.cache_shapes else []
        if states := getattr(attention, "state_shapes", None):
            held.append(("a state whatever the context", states))
        kinds[" and ".join(f"{what} ({_shapes(shapes)})" for what, shapes in held) or "nothing"] += 1
    if len(kinds) == 1:
        return next(iter(kinds))
    return ", ".join(f"{kind} in {count} of {len(model.attentions)} layers" for kind, count in kinds.items())


def _shapes(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {' x '.join(map(str, shape))}" for name, shape in shapes.items())


def _figures(run: Path) -> list[str]:
    """A table of the run's scores: its last validation and every evaluation."""
    if not finished(run):
        return ["The run had not finished training when it was exported: it has no final figures.", ""]
    figures = ("dataset", "split", "evaluated_tokens", "loss", "perplexity", "bits_per_byte")
    scores: list[Mapping[str, Any]] = [read_summary(run, *figures), *read_evaluations(run)]
    lines = [
        "## Figures",
        "",
        markdown_row(["dataset", "split", "tokens", *(metric.unit for metric in SCORES.values()), "scored"]),
        markdown_row(["---"] * (4 + len(SCORES))),
    ]
    for score in scores:
        how = ["per document" if score.get("per_document") else "in windows"]
        if score.get("through_cache"):
            how.append(f"through a cache of {score.get('cache_dtype')}")
        if score.get("cache_window") is not None:
            how.append(f"of the newest {score['cache_window']:,} positions")
        lines.append(
            markdown_row(
                [
                    score["dataset"],
                    score["split"],
                    f"{score['evaluated_tokens']:,}",
                    *(metric.text(metric.of(score)) for metric in SCORES.values()),
                    ", ".join(how),
                ]
            )
        )
    return [*lines, ""]
