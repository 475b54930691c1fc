"""A Hugging Face checkpoint as a run of ours: the opposite direction of harness/huggingface.py.

What config.json says is either kept exactly or refused, naming the field (harness/their_config.py). Weights go from
safetensors to safetensors one tensor at a time, in their own dtype; nothing is computed but a reordering of rows (and,
where norm_eps is not that of DeepSeek's latent norms, one factor).

Letters: D d_model, H heads, N un-rotated and P rotated part of queries and keys, V value width, L kv_lora_rank,
R q_lora_rank.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.build import build_model
from harness.config import differences, load_run_config, load_train_config, origin_hash, train_config
from harness.data import Tokenizer, check, hub_client
from harness.errors import UserError
from harness.export import check_target
from harness.huggingface import LATENT_NORM_EPS
from harness.made import ORIGIN_FILE, make_run
from harness.run import read_json
from harness.schema import TokenizerConfig, TrainConfig
from harness.shards import DTYPES, ShardWriter, Slot, Stored, open_shards
from harness.their_config import FAMILIES, Description, describe
from harness.training.checkpoint import unique_tensors
from modeling.attention import EXECUTION
from modeling.attention.cache import DTYPES as CACHE_DTYPES
from modeling.gpt import GPT

CONFIG, INDEX, WEIGHTS, TOKENIZER = "config.json", "model.safetensors.index.json", "model.safetensors", "tokenizer.json"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_SCORED_TOKENS = 16_384  # in one forward pass of an evaluation, where the window is no longer
_LEARNING_RATE = 2e-5  # of whoever trains on: a usual one for weights that have been trained
# Buffers that older checkpoints carry; what they hold follows from config.json.
_COMPUTED = re.compile(r"(?:.*\.)?rotary_emb\.inv_freq")


@dataclass(frozen=True)
class Source:
    """A checkpoint's files on this machine. revision: the hub's commit, None for a local folder."""

    name: str
    revision: str | None
    config: Path
    tokenizer: Path
    shards: tuple[Path, ...]
    index: Path | None

    @property
    def files(self) -> list[Path]:
        return [self.config, self.tokenizer, *([self.index] if self.index else []), *self.shards]


@dataclass(frozen=True)
class Plan:
    """What an import will write. notes: what a user must know of it, a sentence each."""

    source: Source
    config: TrainConfig
    model: GPT  # on the meta device
    recipes: Mapping[str, Recipe]  # by the name of our tensor
    tensors: Mapping[str, Stored]
    model_type: str
    notes: tuple[str, ...]

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def cache_bytes_per_token(self) -> int:
        """All layers, in cache.dtype, read off allocated buffers."""
        caches = self.model.new_cache(1, 1, dtype=CACHE_DTYPES[self.config.cache.dtype], device="cpu")
        return sum(cache.bytes_per_token for cache in caches)

    def lines(self) -> list[str]:
        """What a person wants to know of the import."""
        revision = f" at {self.source.revision}" if self.source.revision else ""
        return [
            f"source      {self.source.name}{revision}: {FAMILIES[self.model_type].architecture}",
            f"attention   {self.config.attention['name']}, {self.config.model.n_layers} layers, context "
            f"{self.config.model.max_seq_len:,}",
            f"parameters  {self.parameters:,}",
            f"KV cache    {self.cache_bytes_per_token:,} bytes per token in {self.config.cache.dtype}",
            *(f"note        {note}" for note in self.notes),
        ]


@dataclass(frozen=True)
class Recipe:
    """How one of our tensors is made of one of theirs, which has this shape. source None: zeros."""

    source: str | None
    shape: tuple[int, ...]
    make: Callable[[Tensor], Tensor] = lambda tensor: tensor
    factor: float = 1.0


def plan_import(source: Source, target: Path, *, overrides: Sequence[str], max_seq_len: int | None) -> Plan:
    """Read and check everything but the weights' values. Writes nothing.

    overrides: dataset and data_dir as train_model.py takes them. max_seq_len: a shorter context than config.json's.
    Raises UserError, naming the field or tensor, for what our classes do not compute or the files do not hold.
    """
    theirs = describe(_their_json(source.config), max_seq_len)
    tensors = open_shards(source.shards)
    notes = list(theirs.notes)
    tokenizer = Tokenizer.load(source.tokenizer)
    rows = theirs.vocab_size
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"{source.tokenizer} has {tokenizer.vocab_size:,} tokens and the embedding vocab_size={rows:,} rows: bring the "
            f"tokenizer.json that the model was trained with"
        )
    notes += _tokenizer_notes(source.tokenizer, tokenizer, theirs)
    base = load_train_config([
        f"name={target.name}", f"runs_dir={target.parent}", f"model.default_lr={_LEARNING_RATE}", *overrides,
    ])  # fmt: skip
    last = source.name.rstrip("/").rpartition("/")[2]
    model = dataclasses.replace(
        base.model, name=re.sub(r"[^A-Za-z0-9._-]+", "_", last) or "imported", **theirs.sizes,
        tie_embeddings=_tied(theirs.tied, tensors, notes), vocab_size=rows if rows > tokenizer.vocab_size else None,
    )  # fmt: skip
    evaluation = dataclasses.replace(
        base.evaluation, batch_size=max(1, min(base.evaluation.batch_size, _SCORED_TOKENS // model.max_seq_len))
    )
    config = dataclasses.replace(
        base, name=target.name, model=model, attention=theirs.attention | {"dropout": 0.0} | EXECUTION,
        evaluation=evaluation, tokenizer=TokenizerConfig(name="pretrained", path=str(target / TOKENIZER)),
    )  # fmt: skip
    config = train_config(dataclasses.asdict(config))
    check(config.dataset, config.tokenizer)
    with torch.device("meta"):
        meta = build_model(config, tokenizer.vocab_size)
    recipes = dict(_recipes(meta, config, interleaved=theirs.interleaved))
    _check_tensors(recipes, tensors, theirs, notes)
    return Plan(source, config, meta, recipes, tensors, theirs.model_type, tuple(notes))


def _tokenizer_notes(file: Path, tokenizer: Tokenizer, theirs: Description) -> list[str]:
    notes = []
    if (_their_json(file).get("post_processor") or {}).get("type") not in (None, "ByteLevel"):
        notes.append("the tokenizer's post_processor, which may begin a text with a token, is not applied: a text is its "
                     "own tokens")  # fmt: skip
    if theirs.end_of_text and tokenizer.end_of_text not in theirs.end_of_text:
        notes.append(f"documents end with token {tokenizer.end_of_text} here, not with eos_token_id="
                     f"{', '.join(map(str, theirs.end_of_text))}")  # fmt: skip
    return notes


def import_model(plan: Plan, target: Path) -> None:
    """Write the run. Raises UserError when `target` is taken or cannot be written, or a file is not what it should be."""
    check_target(target)
    writer = ShardWriter({
        name: Slot(tuple(tensor.shape), _dtype(plan, plan.recipes[name]))
        for name, tensor in unique_tensors(plan.model).items()
    })  # fmt: skip
    hashes = file_hashes(plan.source)

    def write(path: Path) -> None:
        from tqdm import tqdm

        bar = tqdm(writer.names, desc="import", unit="tensor", leave=False, disable=None)
        writer.write(path, (_made(plan, plan.recipes[name], writer.slots[name]) for name in bar))

    make_run(
        _with_origin(plan.config, hashes), target, write_model=write, model_bytes=writer.nbytes,
        tokenizer_file=plan.source.tokenizer, origin=origin(plan, hashes), steps=0,
    )  # fmt: skip


def _with_origin(config: TrainConfig, hashes: Mapping[str, str]) -> TrainConfig:
    """Imports of one shape and other weights are other setups."""
    return dataclasses.replace(config, init_setup=origin_hash(dict(hashes)))


def origin(plan: Plan, hashes: Mapping[str, str]) -> dict[str, Any]:
    """The content of origin.json."""
    return {
        "kind": "import", "source": plan.source.name, "revision": plan.source.revision, "model_type": plan.model_type,
        "architecture": FAMILIES[plan.model_type].architecture, "sha256": dict(hashes), "notes": list(plan.notes),
    }  # fmt: skip


def already_imported(plan: Plan, target: Path) -> bool:
    """Whether `target` holds this very import: the same files by SHA-256, imported with the same settings.

    Raises UserError where it holds an import of the same name that differs.
    """
    if not (target / ORIGIN_FILE).is_file() or not (target / "config.yaml").is_file():
        return False
    there = read_json(target / ORIGIN_FILE)
    if there.get("kind") != "import":
        return False
    hashes = file_hashes(plan.source)
    differing = differences(_with_origin(plan.config, hashes), load_run_config(target))
    if there.get("sha256") != hashes:
        differing.insert(0, f"it was imported from other files, those of {there.get('source')}")
    if differing:
        raise UserError(f"to={target} holds another import ({'; '.join(differing[:3])}): choose another folder")
    return True


def file_hashes(source: Source) -> dict[str, str]:
    """SHA-256 of each file, by name."""
    hashes = {}
    for path in source.files:
        try:
            with path.open("rb") as file:
                hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}): fetch it again") from None
    return hashes


# --- files -----------------------------------------------------------------------------------------------------------


def find_source(text: str) -> Source:
    """The files of a local folder, or of NAME or NAME@REVISION on the hub, downloaded into the hub's cache.

    A path that exists wins. Raises UserError (HubUnreachable where the hub is out of reach), in one sentence, for files
    that are missing and for weights that are pickled: those are never loaded.
    """
    folder = Path(text).expanduser()
    if folder.is_dir():
        return _local_source(folder.absolute())
    if folder.exists():
        raise UserError(f"source={text} is a file: name the folder that holds its config.json")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?", text) or text.startswith("."):
        raise UserError(f"source={text} does not exist: name a folder with a config.json, or a model on the hub")
    repository, _, revision = text.partition("@")
    if hub_client.offline():
        return _cached_source(text, repository, revision or None)
    commit, hashes = hub_client.model_files(repository, revision or None)

    def fetch(name: str) -> Path | None:
        if name not in hashes:
            return None
        path = hub_client.model_file(repository, name, commit)
        if not hub_client.is_whole(path, hashes[name]):
            raise UserError(f"{path} is not what the hub states of {name}: delete it and run this again")
        return path

    return _source(repository, commit, fetch, sorted(hashes), f"{repository} on the hub")


def _local_source(folder: Path) -> Source:
    def fetch(name: str) -> Path | None:
        return folder / name if (folder / name).is_file() else None

    return _source(str(folder), None, fetch, sorted(path.name for path in folder.iterdir()), str(folder))


def _cached_source(text: str, repository: str, revision: str | None) -> Source:
    """As it lies in the hub's cache, the network forbidden."""
    config = hub_client.cached_file(repository, CONFIG, revision, "model")
    if config is None:
        hub_client.connect(repository, f"source={text}", "weights")  # says that HF_HUB_OFFLINE is set
        raise AssertionError("offline() is true")
    folder = config.parent

    def fetch(name: str) -> Path | None:
        return hub_client.cached_file(repository, name, folder.name, "model")

    names = sorted(path.name for path in folder.iterdir())
    return _source(repository, folder.name, fetch, names, f"{folder} (HF_HUB_OFFLINE is set)")


def _source(
    name: str, revision: str | None, fetch: Callable[[str], Path | None], names: Sequence[str], place: str
) -> Source:
    """names: of all files, to say what is there instead."""
    config = fetch(CONFIG)
    if config is None:
        raise UserError(f"{place} has no {CONFIG}: name the folder of a transformers model")
    describe(_their_json(config))  # before gigabytes are fetched
    index = fetch(INDEX)
    if index is not None:
        shard_names = _shards_of(index)
    elif WEIGHTS in names:
        shard_names = [WEIGHTS]
    elif pickled := [other for other in names if other.endswith(_PICKLED)]:
        raise UserError(
            f"{place} has pickled weights only ({pickled[0]}), which can run code when loaded and are not read: convert "
            f"them to safetensors (save_pretrained of transformers writes it)"
        )
    else:
        raise UserError(f"{place} has neither {WEIGHTS} nor {INDEX}: nothing holds the weights")
    tokenizer = fetch(TOKENIZER)
    if tokenizer is None:
        raise UserError(
            f"{place} has no {TOKENIZER}, which the run's text is encoded with: save the fast tokenizer beside the weights"
        )
    shards = []
    for shard in shard_names:
        path = fetch(shard)
        if path is None:
            raise UserError(f"{shard}, a shard that {INDEX} names, is not in {place}: fetch it too")
        shards.append(path)
    return Source(name, revision, config, tokenizer, tuple(shards), index)


def _shards_of(index: Path) -> list[str]:
    placed = _their_json(index).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise UserError(f"{index} has no weight_map, which names the shards: fetch it again")
    names = sorted({str(name) for name in placed.values()})
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*\.safetensors", name):
            raise UserError(
                f"{index} names {name} as a shard, which is no plain name of a safetensors file: correct it"
            )
    return names


def _their_json(path: Path) -> dict[str, Any]:
    """As read_json, with a remedy for a file of somebody else's."""
    try:
        return read_json(path)
    except UserError:
        raise UserError(f"{path} holds no JSON object: fetch it again") from None


# --- weights ---------------------------------------------------------------------------------------------------------


def _tied(said: bool, tensors: Mapping[str, Stored], notes: list[str]) -> bool:
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


def _recipes(model: GPT, config: TrainConfig, *, interleaved: bool) -> Iterator[tuple[str, Recipe]]:
    """For each of our tensors, theirs."""
    outer = {"embedding.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight",
             "head.weight": "lm_head.weight"}  # fmt: skip
    inner = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm", "mlp": "mlp",
             "attention": "self_attn"}  # fmt: skip
    latent = _latent_recipes(config, interleaved=interleaved) if config.attention["mechanism"] == "mla" else {}
    for name, tensor in unique_tensors(model).items():
        shape = tuple(tensor.shape)
        if name in outer:
            rows = shape if name == "norm.weight" else (model.vocab_size, *shape[1:])
            yield name, Recipe(outer[name], rows)
            continue
        _, number, part, key = name.split(".", 3)
        prefix = f"model.layers.{number}.{inner[part]}."
        if part == "attention" and key in latent:
            recipe = latent[key]
            yield name, dataclasses.replace(recipe, source=recipe.source and prefix + recipe.source)
        else:
            yield name, Recipe(prefix + key, shape)


def _latent_recipes(config: TrainConfig, *, interleaved: bool) -> dict[str, Recipe]:
    """One layer's MLA tensors from DeepSeek's: the inverse of what harness/huggingface.py does.

    Their norms of latents have an eps of their own. A latent divided by a is normed with eps as the latent itself with
    eps a^2: that makes their eps of ours.
    """
    options, D, H = config.attention, config.model.d_model, config.model.n_heads
    N, P, V = options["qk_nope_head_dim"], options["qk_rope_head_dim"], options["v_head_dim"]
    L, R = options["kv_lora_rank"], options["q_lora_rank"]
    factor = (config.model.norm_eps / LATENT_NORM_EPS) ** 0.5

    def halves(rows: Tensor, dim: int = 0) -> Tensor:
        """Rows that are rotated in pairs (2i, 2i + 1), reordered for pairs (i, i + P/2)."""
        return rows.unflatten(dim, (-1, 2)).transpose(dim, dim + 1).flatten(dim, dim + 1) if interleaved else rows

    def queries(weight: Tensor) -> Tensor:
        nope, rope = weight.unflatten(0, (H, N + P)).split((N, P), dim=1)
        return torch.cat([nope, halves(rope, 1)], dim=1).flatten(0, 1)

    def up(part: slice) -> Callable[[Tensor], Tensor]:
        return lambda weight: weight.unflatten(0, (H, N + V))[:, part].flatten(0, 1)

    down, both = "kv_a_proj_with_mqa", (H * (N + V), L)
    recipes = {
        "k_up_proj.weight": Recipe("kv_b_proj.weight", both, up(slice(None, N))),
        "v_up_proj.weight": Recipe("kv_b_proj.weight", both, up(slice(N, None))),
        "latent_norms.0.weight": Recipe("kv_a_layernorm.weight", (L,)),
    }
    for key, shape in (("weight", (L + P, D)), ("bias", (L + P,))):
        recipes[f"kv_down_proj.{key}"] = Recipe(f"{down}.{key}", shape, lambda tensor: tensor[:L], factor)
        recipes[f"k_rope_proj.{key}"] = Recipe(f"{down}.{key}", shape, lambda tensor: halves(tensor[L:]))
    if R is None:
        recipes["q_proj.weight"] = Recipe("q_proj.weight", (H * (N + P), D), queries)
        recipes["q_proj.bias"] = Recipe(None, (H * (N + P),))
    else:
        recipes["q_down_proj.weight"] = Recipe("q_a_proj.weight", (R, D), factor=factor)
        recipes["q_down_proj.bias"] = Recipe("q_a_proj.bias", (R,), factor=factor)
        recipes["q_latent_norm.weight"] = Recipe("q_a_layernorm.weight", (R,))
        recipes["q_up_proj.weight"] = Recipe("q_b_proj.weight", (H * (N + P), R), queries)
    return recipes


def _check_tensors(
    recipes: Mapping[str, Recipe], tensors: Mapping[str, Stored], theirs: Description, notes: list[str]
) -> None:
    """Raises UserError unless every tensor that is needed is there in the shape that config.json asks for, and no other."""
    for name, recipe in recipes.items():
        if recipe.source is None:
            if name.startswith("blocks.0."):
                notes.append(f"there is no such bias as {name}, so it is zeros")
            continue
        stored = tensors.get(recipe.source)
        if stored is None:
            raise UserError(f"{recipe.source} is in none of the weight files: the checkpoint is not whole, or not of "
                            f"model_type={theirs.model_type}")  # fmt: skip
        if stored.shape != recipe.shape:
            raise UserError(f"{recipe.source} is {stored.shape} in {stored.file.name} and {recipe.shape} by config.json: "
                            f"the two are not of one model")  # fmt: skip
        if stored.dtype not in DTYPES:
            raise UserError(f"{recipe.source} is of {stored.dtype}, which is not read: convert the weights to one of "
                            f"{', '.join(DTYPES)}")  # fmt: skip
    used = {recipe.source for recipe in recipes.values()} | {"lm_head.weight"}
    odd = [name for name in tensors if name not in used and not _COMPUTED.fullmatch(name)]
    layers = theirs.sizes["n_layers"]
    if theirs.model_type == "deepseek_v3":  # their modules for multi-token prediction stand behind the last layer
        mtp = [name for name in odd if (found := re.match(r"model\.layers\.(\d+)\.", name)) and int(found[1]) >= layers]
        if mtp:
            notes.append(f"{len(mtp)} tensors of multi-token prediction (layers from {layers} on) are left out")
        odd = [name for name in odd if name not in mtp]
    if odd:
        raise UserError(f"{min(odd)} is in the weight files and has no place in model_type={theirs.model_type} with this "
                        f"config.json ({len(odd)} such tensors): the two are not of one model")  # fmt: skip


def _dtype(plan: Plan, recipe: Recipe) -> torch.dtype:
    """Theirs; float32 for a product, which their dtype would round."""
    if recipe.source is None or recipe.factor != 1.0:
        return torch.float32
    return DTYPES[plan.tensors[recipe.source].dtype]


def _made(plan: Plan, recipe: Recipe, slot: Slot) -> Tensor:
    if recipe.source is None:
        return torch.zeros(slot.shape, dtype=slot.dtype)
    made = recipe.make(plan.tensors[recipe.source].read())
    return made if recipe.factor == 1.0 else (made.double() * recipe.factor).to(slot.dtype)
