"""A Hugging Face checkpoint as a run of ours: the opposite direction of harness/hf/classes.py.

What config.json says is either kept exactly or refused, naming the field (harness/hf/config_json.py). Weights go from
safetensors to safetensors one tensor at a time, in their own dtype; nothing is computed but a reordering of rows (and one
factor where norm_eps is not that of DeepSeek's latent norms, and the 1 that Qwen3.5's norms add to their weights), see
harness/hf/weights.py.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.config.build import build_model
from harness.config.checks import train_config
from harness.config.compose import load_train_config
from harness.config.identity import differences, origin_hash
from harness.config.run_config import load_run_config
from harness.config.schema import TokenizerConfig, TrainConfig
from harness.data import PreparedData, Tokenizer, check_corpus, prepare
from harness.errors import UserError
from harness.files.atomic import check_target, read_json
from harness.files.text import counted, some_of
from harness.hf.checkpoint_files import TOKENIZER, CheckpointFiles
from harness.hf.classes import left_out_by
from harness.hf.config_json import FAMILIES, their_json
from harness.hf.options import Description, describe
from harness.hf.shards import DTYPES, ShardWriter, TensorInFile, TensorSpec, open_shards
from harness.hf.weights import TensorMapping, tensor_mappings
from harness.runs.from_weights import ORIGIN_FILE, make_run
from harness.runs.text_settings import TheirText, read_text
from harness.training.checkpoint import unique_tensors
from modeling.attention import EXECUTION
from modeling.attention.quantisation import cache_format
from modeling.gpt import GPT
from modeling.shapes import shapes_only

_SCORED_TOKENS = 16_384  # in one forward pass of an evaluation, where the window is no longer
_LEARNING_RATE = 2e-5  # of whoever trains on: a usual one for weights that have been trained


@dataclass(frozen=True)
class ImportPlan:
    """What an import will write. notes: what a user must know of it, a sentence each."""

    source: CheckpointFiles
    config: TrainConfig
    model: GPT  # on the meta device
    mappings: Mapping[str, TensorMapping]  # by the name of our tensor
    tensors: Mapping[str, TensorInFile]
    model_type: str
    text: TheirText
    notes: tuple[str, ...]

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def cache_bytes_per_token(self) -> float:
        """All layers that hold it, in cache.dtype, read off allocated buffers."""
        caches = self.model.new_cache(1, 1, dtype=cache_format(self.config.cache.dtype), device="cpu")
        return sum(cache.bytes_per_token for cache in caches)

    @property
    def _at_context(self) -> str:
        """What the whole context takes, where that is less than its tokens' bytes."""
        context, dtype = self.model.max_seq_len, cache_format(self.config.cache.dtype)
        held = sum(cache.nbytes for cache in self.model.new_cache(1, context, dtype=dtype, device="meta"))
        return "" if held == context * self.cache_bytes_per_token else f", {held:,} at {context:,} tokens"

    def lines(self) -> list[str]:
        """What a person wants to know of the import."""
        revision = f" at {self.source.revision}" if self.source.revision else ""
        return [
            f"source      {self.source.name}{revision}: {FAMILIES[self.model_type].architecture}",
            f"attention   {self.config.attention['name']}, {self.config.model.n_layers} layers, context "
            f"{self.config.model.max_seq_len:,}",
            f"parameters  {self.parameters:,}",
            f"KV cache    {self.cache_bytes_per_token:,} bytes per token in {self.config.cache.dtype}{self._at_context}",
            *(f"note        {note}" for note in self.notes),
        ]


def plan_import(source: CheckpointFiles, target: Path, *, overrides: Sequence[str], max_seq_len: int | None) -> ImportPlan:
    """Read and check everything but the weights' values. Writes nothing.

    overrides: dataset and data_dir as train_model.py takes them. max_seq_len: a shorter context than config.json's.
    Raises UserError, naming the field or tensor, for what our classes do not compute or the files do not hold.
    """
    theirs = describe(their_json(source.config), max_seq_len)
    tensors = open_shards(source.shards)
    notes = list(theirs.notes)
    tokenizer = Tokenizer.load(source.tokenizer)
    rows = theirs.vocab_size
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"{source.tokenizer} has {tokenizer.vocab_size:,} tokens and the embedding vocab_size={rows:,} rows: bring the "
            f"tokenizer.json that the model was trained with"
        )
    text = read_text(source.text, their_json(source.config), tokenizer.vocabulary)
    notes += _tokenizer_notes(tokenizer, text)
    base = load_train_config(
        [f"name={target.name}", f"runs_dir={target.parent}", f"model.default_lr={_LEARNING_RATE}", *overrides]
    )
    last = source.name.rstrip("/").rpartition("/")[2]
    model = dataclasses.replace(
        base.model,
        name=re.sub(r"[^A-Za-z0-9._-]+", "_", last) or "imported",
        **theirs.sizes,
        tie_embeddings=_tied(theirs.tied, tensors, notes),
        vocab_size=rows if rows > tokenizer.vocab_size else None,
    )
    evaluation = dataclasses.replace(
        base.evaluation, batch_size=max(1, min(base.evaluation.batch_size, _SCORED_TOKENS // model.max_seq_len))
    )
    config = dataclasses.replace(
        base,
        name=target.name,
        model=model,
        attention=theirs.attention | {"dropout": 0.0} | EXECUTION,
        evaluation=evaluation,
        tokenizer=TokenizerConfig(name="pretrained"),
    )
    config = train_config(dataclasses.asdict(config))
    check_corpus(config.dataset, config.tokenizer, has_file=True)
    with shapes_only():
        meta = build_model(config, tokenizer.vocab_size)
    made_of = dict(tensor_mappings(meta, config, FAMILIES[theirs.model_type], interleaved=theirs.interleaved))
    _check_tensors(made_of, tensors, theirs, notes)
    return ImportPlan(source, config, meta, made_of, tensors, theirs.model_type, text, tuple(notes))


def _tokenizer_notes(tokenizer: Tokenizer, text: TheirText) -> list[str]:
    notes, (before, behind) = [], tokenizer.added()
    if before:
        notes.append(f"a text begins with {_tokens(before)}, as tokenizer.json says")
    if behind:
        notes.append(f"tokenizer.json ends a text with {_tokens(behind)}, which is left out: a prompt goes on")
    if text.stops and tokenizer.end_of_text not in text.stops:
        notes.append(
            f"documents end with token {tokenizer.end_of_text} here, writing with eos_token_id="
            f"{', '.join(map(str, text.stops))}"
        )
    return notes


def _tokens(numbers: Sequence[int]) -> str:
    return f"token{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def import_model(plan: ImportPlan, target: Path) -> None:
    """Write the run. Raises UserError when `target` is taken or cannot be written, or a file is not what it should be."""
    check_target(target)
    writer = ShardWriter(
        {
            name: TensorSpec(tuple(tensor.shape), _dtype(plan, plan.mappings[name]))
            for name, tensor in unique_tensors(plan.model).items()
        }
    )
    hashes = plan.source.hashes()

    def write(path: Path) -> None:
        from tqdm import tqdm

        bar = tqdm(writer.names, desc="import", unit="tensor", leave=False, disable=None)
        writer.write(path, (_made(plan, plan.mappings[name], writer.specs[name]) for name in bar))

    make_run(
        _with_origin(plan.config, hashes),
        target,
        write_model=write,
        model_bytes=writer.nbytes,
        tokenizer_file=plan.source.tokenizer,
        text=plan.text,
        origin=origin(plan, hashes),
        steps=0,
    )


def _with_origin(config: TrainConfig, hashes: Mapping[str, str]) -> TrainConfig:
    """Imports of one shape and other weights are other setups."""
    return dataclasses.replace(config, init_setup=origin_hash(dict(hashes)))


def origin(plan: ImportPlan, hashes: Mapping[str, str]) -> dict[str, Any]:
    """The content of origin.json."""
    return {
        "kind": "import",
        "source": plan.source.name,
        "revision": plan.source.revision,
        "model_type": plan.model_type,
        "architecture": FAMILIES[plan.model_type].architecture,
        "sha256": dict(hashes),
        "notes": list(plan.notes),
    }


def already_imported(plan: ImportPlan, target: Path) -> bool:
    """Whether `target` holds this very import: the same files by SHA-256, imported with the same settings.

    Raises UserError where it holds an import of the same name that differs.
    """
    if not (target / ORIGIN_FILE).is_file() or not (target / "config.yaml").is_file():
        return False
    there = read_json(target / ORIGIN_FILE)
    if there.get("kind") != "import":
        return False
    hashes = plan.source.hashes()
    # Older imports name their tokenizer's place, which says nothing of what they are: the file is among the hashes.
    differing = differences(_with_origin(plan.config, hashes), load_run_config(target), apart_from=("tokenizer.path",))
    if there.get("sha256") != hashes:
        differing.insert(0, f"it was imported from other files, those of {there.get('source')}")
    if differing:
        raise UserError(f"to={target} holds another import ({'; '.join(differing[:3])}): choose another folder")
    return True


def score_data(plan: ImportPlan, target: Path) -> PreparedData:
    """What the import in `target` is scored on, in its own tokens: as this command names it."""
    return prepare(
        plan.config.dataset,
        plan.config.tokenizer,
        Path(plan.config.data_dir),
        tokenizer_file=target / TOKENIZER,
        for_training=False,
    )


def _tied(said: bool, tensors: Mapping[str, TensorInFile], notes: list[str]) -> bool:
    """Whether the head is the embedding. said: by config.json."""
    head, embedding = tensors.get("lm_head.weight"), tensors.get("model.embed_tokens.weight")
    if head is None:
        if not said:
            notes.append("there is no lm_head.weight, so the head is the embedding, though tie_word_embeddings=false")
        return True
    if not said:
        return False
    same = embedding is not None and head.shape == embedding.shape and torch.equal(head.read(), embedding.read())
    if not same:
        notes.append("lm_head.weight differs from the embedding and is kept, though tie_word_embeddings=true")
    return same


def _check_tensors(
    mappings: Mapping[str, TensorMapping], tensors: Mapping[str, TensorInFile], theirs: Description, notes: list[str]
) -> None:
    """Raises UserError unless every tensor that is needed is there in the shape that config.json asks for.

    Others are refused, but for those that their class leaves out too.
    """
    for name, mapping in mappings.items():
        if mapping.source is None:
            if name.startswith("blocks.0."):
                notes.append(f"there is no such bias as {name}, so it is zeros")
            continue
        stored = tensors.get(mapping.source)
        if stored is None:
            raise UserError(
                f"{mapping.source} is in none of the weight files: the checkpoint is not whole, or not of "
                f"model_type={theirs.model_type}"
            )
        if stored.shape != mapping.shape:
            raise UserError(
                f"{mapping.source} is {stored.shape} in {stored.file.name} and {mapping.shape} by config.json: "
                f"the two are not of one model"
            )
        if stored.dtype not in DTYPES:
            raise UserError(
                f"{mapping.source} is of {stored.dtype}, which is not read: convert the weights to one of {', '.join(DTYPES)}"
            )
    used = {mapping.source for mapping in mappings.values()} | {"lm_head.weight"}
    odd = sorted(name for name in tensors if name not in used)
    architecture = FAMILIES[theirs.model_type].architecture
    assert architecture is not None
    if odd and (left_out := left_out_by(architecture, odd)):
        notes.append(f"left out, as transformers does, {counted(len(left_out), 'tensor')}: {some_of(left_out)}")
        odd = [name for name in odd if name not in left_out]
    if odd:
        raise UserError(
            f"{odd[0]} is in the weight files and has no place in model_type={theirs.model_type} with this "
            f"config.json ({len(odd)} such tensors): the two are not of one model"
        )


def _dtype(plan: ImportPlan, mapping: TensorMapping) -> torch.dtype:
    """Theirs; float32 for what is computed, which their dtype would round."""
    if mapping.source is None or mapping.computes:
        return torch.float32
    return DTYPES[plan.tensors[mapping.source].dtype]


def _made(plan: ImportPlan, mapping: TensorMapping, spec: TensorSpec) -> Tensor:
    if mapping.source is None:
        return torch.zeros(spec.shape, dtype=spec.dtype)
    made = mapping.make(plan.tensors[mapping.source].read())
    return (made.double() * mapping.factor + mapping.offset).to(spec.dtype) if mapping.computes else made
