"""The typed schema that every YAML under configs/ is checked against: plain dataclasses, whose types say what is legal.

`None` is legal only where it means absence. Fields of which a group owns the default (model, optimizer, ...) carry
none here: the YAML must say them. An attention variant's schema is read off its class (see harness/config/checks.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal

from harness.files.untrusted import Figure, Positive
from modeling.cache_formats import read_format
from modeling.refusal import Refusal


def _limit(holds: Callable[[Any], bool], otherwise: str) -> Callable[[Any], None]:
    """What raises Refusal for a value that is none of a type's: `otherwise` goes on where the value ends."""

    def check(value: Any) -> None:
        if not holds(value):
            raise Refusal(f"{value} {otherwise}")

    return check


CacheDtype = Annotated[str, read_format]
Fraction = Annotated[float, _limit(lambda value: 0 <= value <= 1, "is no fraction: give a number from 0 to 1")]
Stride = Annotated[float, _limit(lambda value: 0 < value <= 1, "must be above 0 and at most 1 (a window)")]
Seed = Annotated[int, 0, _limit(lambda value: value < 2**63, "is too large for torch's generator; choose a seed below 2^63")]
Betas = Annotated[
    list[float],
    _limit(
        lambda value: len(value) == 2 and all(0 <= beta < 1 for beta in value),
        "must be two numbers in [0, 1), such as [0.9, 0.95]",
    ),
]
Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "float32", "bfloat16"]
Split = Literal["train", "validation", "test"]
Switch = Literal["auto", "on", "off"]
Tracker = Literal["wandb", "trackio", "none"]  # harness/tracking/


@dataclass
class ModelConfig:
    """Shape of the GPT around the attention, and the training defaults that belong to the size."""

    name: str
    d_model: Positive
    n_layers: Positive
    n_heads: Positive
    head_dim: Positive
    max_seq_len: Positive
    mlp: Literal["swiglu", "relu2"]
    mlp_hidden: Positive
    tie_embeddings: bool
    bias: bool
    dropout: float
    norm_eps: Figure
    causal: bool
    init: str  # normal | fan_in | xavier
    init_std: Figure
    zero_init_outputs: bool
    activation_checkpointing: bool
    default_tokens: int
    default_batch_size: int
    default_lr: float
    default_width_base: int | None = None  # optimizer.width_base of default_lr; None: default_lr is of this very width
    vocab_size: int | None = None  # of a checkpoint with more rows than its tokenizer has tokens; None: the tokenizer's


MODEL_DEFAULTS = tuple(each.name for each in fields(ModelConfig) if each.name.startswith("default_"))


@dataclass
class DatasetConfig:
    """Where the text comes from. `name` names the cache folder and stands in every run."""

    name: str
    source: str  # a name in SOURCES (harness/data/sources.py)
    # local: a file, folder or glob; classic_books: a folder with its parquet files; linux: an archive; hub: a folder with
    # the files that sha256 names; all: a folder prepared on this or another machine
    path: str | None = None
    text_column: str = "text"
    max_tokens: int | None = None  # cap on the training split
    validation_fraction: float = 0.05  # used where the source has no such split
    test_fraction: float = 0.05
    split_seed: int = 0
    hub_name: str | None = None
    hub_config: str | None = None
    hub_revision: str | None = None
    hub_streaming: bool = False
    hub_rows: str = "documents"  # what a row is: documents | wikitext_lines (joined into articles)
    sha256: dict[str, str] = field(default_factory=dict)  # file in the source -> SHA-256, checked when present
    # synthetic_: of source synthetic only (harness/data/synthetic.py), and no part of what other runs are
    synthetic_task: str | None = None  # mqar | passkey
    synthetic_documents: int = 50_000  # in all splits, shared out by the two fractions
    synthetic_tokens: int = 256  # of every document, its end of text included
    synthetic_pairs: list[int] = field(default_factory=lambda: [8, 16, 32])  # mqar: in a document, one of these


@dataclass
class TokenizerConfig:
    name: Literal["bpe", "bytes", "pretrained"]
    vocab_size: int | None = None  # bpe only
    # pretrained only: a hub name, a folder or a tokenizer.json; None: the run's own file, as an import has one
    path: str | None = None


@dataclass
class OptimizerConfig:
    name: str  # adamw | muon
    lr: Annotated[float, _limit(lambda value: value > 0, "trains nothing: give a rate above 0")]
    betas: Betas
    eps: Annotated[float, _limit(lambda value: value > 0, "must be above 0")]
    weight_decay: Figure
    grad_clip: Figure  # 0 switches clipping off
    muon_lr: float | None = None  # muon only: the matrices' rate (lr is then the rate of everything else)
    muon_momentum: float | None = None
    width_base: Annotated[int, 1] | None = None  # d_model at which the rates were found: see training/optimizer.py


@dataclass
class ScheduleConfig:
    name: Literal["cosine", "wsd"]
    warmup_fraction: Fraction  # of the steps
    final_lr_fraction: Fraction  # of the peak
    decay_fraction: Fraction | None = None  # wsd only: the last part of the steps, in which the rate falls


@dataclass
class TrackingConfig:
    name: Tracker  # metrics.jsonl is always written
    project: str = "attention-ablation"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    notes: str | None = None


@dataclass
class ParallelConfig:
    """How the processes that torchrun starts share a run; means nothing to one process alone."""

    name: Literal["ddp", "fsdp"] = "ddp"
    # fsdp only
    reshard_after_forward: bool = True  # gathered weights are given up after a block's forward pass and gathered again
    mixed_precision: bool = False  # blocks are gathered in bfloat16; gradients are summed in float32


@dataclass
class BudgetConfig:
    """At most one of the two; neither means the model's default_tokens."""

    tokens: Positive | None = None
    steps: Positive | None = None


@dataclass
class IntervalsConfig:
    """In optimizer steps."""

    log: Positive = 10
    evaluate: Positive = 100
    checkpoint: Positive = 100


@dataclass
class CheckpointsConfig:
    """Of a run's checkpoints/; when they are written: intervals.checkpoint."""

    keep: Positive = 2  # the newest so many
    keep_best: bool = True  # and, of the steps that are saved, the one that validated best, as best/
    background: bool = True  # write while training goes on


@dataclass
class SpikesConfig:
    """Steps whose loss or gradient norm makes no update because it stands out (harness/training/nonfinite.py)."""

    # Standard deviations above the mean; None: no step is skipped for that.
    sigma: Annotated[float, _limit(lambda value: value > 0, "must be above 0, such as 6, or null to skip no spike")] | None = (
        None
    )
    window: Annotated[int, 2] = 100  # last accepted steps that mean and deviation are taken over


@dataclass
class EvaluationConfig:
    max_tokens: Positive | None = None  # validation during training looks at this many tokens at most (None: all)
    batch_size: Positive = 32  # windows per forward pass
    stride_fraction: Stride = 0.5  # of the window


@dataclass
class CacheConfig:
    """The format (modeling/cache_formats.py) that cache sizes are quoted in, and at evaluation what a cache keeps."""

    dtype: CacheDtype = "bfloat16"


@dataclass
class EvalCacheConfig(CacheConfig):
    """With 8 or 4 bits, a window or through=true the split is scored through such a cache, not only quoted."""

    through: bool = False
    window: int | None = None  # newest positions a query sees, its own included; None: all
    sinks: int = 0  # first positions that stay visible beside a window

    @property
    def scores(self) -> bool:
        """Whether the split is scored through it."""
        return self.through or self.window is not None or read_format(self.dtype).in_few_bits


@dataclass
class TrainConfig:
    """What train_model.py needs, whole. `attention` holds the variant's own schema."""

    name: str  # "auto" becomes dataset-model-attention-overrides-seed
    runs_dir: str
    data_dir: str
    seed: Seed
    data_seed: Seed
    device: Device
    precision: Precision
    compile: Switch
    deterministic: bool
    overwrite: bool
    batch_size: Positive  # sequences per optimizer step
    micro_batch_size: Positive | None  # sequences per forward pass; None: chosen from the device
    budget: BudgetConfig
    intervals: IntervalsConfig
    evaluation: EvaluationConfig
    cache: CacheConfig
    attention: dict[str, Any]
    model: ModelConfig
    dataset: DatasetConfig
    tokenizer: TokenizerConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    tracking: TrackingConfig
    capture: Switch = "auto"  # the step replayed from CUDA graphs (harness/training/step.py)
    # A run whose weights this one starts from; its model, attention and tokenizer come along, and its dataset unless one
    # is named.
    init_from: str | None = None
    # Worked out: that run's setup_hash; of a conversion or an import, what made the weights.
    init_setup: str | None = None
    init_data: bool = False  # worked out: the dataset came along, so that its path is that run's word and not followed
    checkpoints: CheckpointsConfig = field(default_factory=CheckpointsConfig)
    on_nonfinite: Literal["stop", "skip"] = "stop"  # what a loss or gradient that is not finite does to the run
    skip_limit: Positive = 10  # steps in a row without an update after which training gives up
    spikes: SpikesConfig = field(default_factory=SpikesConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)


# Tokens of one sequence at which every run and evaluation says its cache's size.
CACHE_CONTEXTS = (1024, 8192, 32768, 131072)
# Of a measurement in a record: beyond it squares of figures are no numbers.
MOST_FIGURE = 1e100
# What is measured beside perplexity: each is the file of its name in harness/evaluation/probes/.
EXTRAS = ("beyond", "repeats", "recall", "latents")


@dataclass
class EvalConfig:
    """What eval_model.py needs: which run, on what, how computed. `attention` holds execution fields only."""

    run: str | None  # a folder, a run's name, "all"; None: the newest finished run
    runs_dir: str
    data_dir: str
    split: Split
    per_document: bool
    stride_fraction: Stride
    batch_size: Positive
    max_tokens: Positive | None
    device: Device
    precision: Precision
    cache: EvalCacheConfig
    attention: dict[str, Any]
    tracking: TrackingConfig
    extras: list[str]  # of EXTRAS
    extras_max_tokens: Positive  # that each extra looks at, at most
    capture: Switch = "auto"  # windows scored from a CUDA graph (harness/evaluation/losses.py)
    dataset: DatasetConfig | None = None  # None: the corpus the run was trained on
    corpus_at: str | None = None  # where that one lies now, said as dataset.path=...; None: where it was
