"""What runs and studies leave on disk, read back: every kind of file has one type and one reader.

A file may come from elsewhere, or from an older version. What a type names is checked where the file has it (kinds, finite
numbers, what can be counted, no name twice); what it does not name is kept as it is. A reader says what its caller needs
besides. All that is wrong is one sentence with the file's name, a UserError.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, NotRequired, TypedDict, TypeVar, cast

from harness.config.run_config import read_run_config
from harness.config.typed import shown, typed
from harness.errors import UserError
from harness.evaluation.metric import METRICS, Facts, Scores, Shown, declared
from harness.files.atomic import read_json, write_json
from harness.files.folders import listed
from harness.files.untrusted import Count, Figure, Positive, Rate, stays_inside
from harness.runs.kind import PLAIN_CACHE

STUDY_FILE = "study.json"  # in a study's folder
DECODE_FILE = "decode.json"  # beside it

_Kind = TypeVar("_Kind")


class Trained(TypedDict, total=False):
    """What an evaluation's record takes over from the training's summary (harness/runs/evaluate_run.py: CARRIED)."""

    name: str
    attention: str
    model: str
    seed: Count
    data_seed: Count
    tokens: Annotated[Count, Shown("tokens")]
    steps: Count
    tokens_per_second: Annotated[Figure | None, Shown("tokens/s")]  # None: imported or converted
    setup_hash: str
    tokenizer_fingerprint: str | None


class RunSummary(Trained, Facts, Scores, total=False):
    """summary.json of a finished run (harness/runs/summary.py)."""

    dataset: str
    initial_tokens: Count
    init_from: str | None
    split: str
    evaluated_tokens: Count
    per_document: bool
    stride_fraction: Figure | None
    max_tokens: Positive | None
    train_loss: Figure | None  # None: imported or converted
    peak_memory_bytes: Count
    captured: bool
    processes: Positive
    skipped_steps: Count
    origin: dict[str, Any]  # of an import or a conversion
    seconds: Figure
    data_fingerprint: str
    kernel: str
    device: str | None
    precision: str | None
    compiled: bool
    torch: str | None
    commit: str | None
    wandb_id: str | None
    finished_at: str | None


class ContextBin(TypedDict):
    low: Positive
    high: Positive
    loss: Figure


class Beyond(TypedDict):
    bins: list[ContextBin]


class PromptFigures(TypedDict):
    length: Count
    accuracy: Figure
    gain: float
    at_floor: NotRequired[bool]  # in full precision no better than without recall; absent from older records


class PairsFigures(TypedDict):
    pairs: Count
    accuracy: Figure


class AnswerFigures(TypedDict):
    accuracy: Figure
    chance: Figure
    at_floor: NotRequired[bool]
    newest: NotRequired[Figure | None]
    by_pairs: list[PairsFigures]


class Recall(TypedDict, total=False):
    passkey: list[PromptFigures] | None
    copying: list[PromptFigures] | None
    answers: AnswerFigures | None


class Repeats(TypedDict, total=False):
    gain: float


class Extras(TypedDict, total=False):
    """Those that a study's report reads closer than as a mapping of figures (harness/evaluation/probes/)."""

    beyond: Beyond | None
    recall: Recall | None
    repeats: Repeats | None


class Evaluation(RunSummary, total=False):
    """evaluations/NAME.json (harness/runs/evaluate_run.py: score_run), some of it taken over from the run's summary."""

    record: str  # the name of its file, without ending
    trained_on: str
    corpus: str
    evaluated_bytes: Count
    evaluated_words: Count | None
    loss_by_position: list[tuple[Positive, Positive, Figure | None]]
    through_cache: bool
    # Mean KL(without || through the cache) of the next token's distributions, nats per token. The scores without one stand
    # under their names with _without_cache behind them.
    cache_divergence: Annotated[float | None, Shown("KL", 5)]
    cache_window: Positive | None
    cache_sinks: Count
    extras: Extras | None
    extras_without_cache: Extras | None  # of an evaluation through a cache
    extras_seconds: Figure
    decode: str | None
    checkpoint: str


class SegmentRecord(TypedDict):
    """segments/NAME.json: losses of the parts of a split, for the bootstrap."""

    nats: list[Figure]
    bytes: list[Count]
    documents: NotRequired[list[Count]]  # that each is cut from; absent from older records


class MatchRecord(TypedDict):
    """A size that was made equal to another arm's, and how well (harness/study/matching.py)."""

    quantity: str
    to: str
    vary: str
    value: Any
    target: Figure
    achieved: Figure
    mismatch: float  # achieved / target - 1


class ArmRecord(TypedDict):
    family: str
    overrides: list[str]
    level: str | None
    reference: bool
    setup_hash: str
    quantities: NotRequired[dict[str, Any]]
    match: list[MatchRecord]
    converted: NotRequired[bool]  # from another arm's weights, without training


class SpecRecord(TypedDict):
    """A run of a study (harness/study/plan.py: RunSpec)."""

    name: str
    arm: str
    lr: Rate
    seed: Count
    budget: Positive | None
    tokens: NotRequired[Count]
    setup_hash: NotRequired[str]
    source: NotRequired[str | None]


class FailureRecord(TypedDict):
    """A run that ended with an error."""

    run: str
    error: str


class DeclarationRecord(TypedDict):
    """What a command declared of a study, where it differed from what was declared before (harness/study/history.py)."""

    at: str | None  # ISO 8601; None: of a record that kept no history
    results: Count | None  # runs that had finished by then; None: not known
    arms: dict[str, list[Count]]  # their seeds
    contrasts: list[tuple[str, str]]
    margin: Rate | None
    trends: NotRequired[list[str]]  # absent from older records
    metric: NotRequired[str]  # likewise
    rates: NotRequired[dict[str, Rate | None]]  # likewise; of each arm's runs, None: a sweep of it shall say


class TrendRecord(TypedDict):
    """A declared trend: how the differences of pairs of arms change with a size of theirs."""

    over: str  # a field of their configuration
    of: list[tuple[str, str]]
    at: list[Positive]  # that field of each pair's arms


class StudyRecord(TypedDict):
    """study.json (harness/study/plan.py: write_record)."""

    name: str
    question: str
    command: str
    metric: str
    base: NotRequired[list[str]]
    contrasts: list[tuple[str, str]]
    trends: NotRequired[dict[str, TrendRecord]]
    dropped_trends: NotRequired[dict[str, TrendRecord]]  # of earlier commands, so that no other one takes such a name
    margin: NotRequired[Rate | None]  # of equivalence, in the metric's unit
    staircase: list[str] | None
    arms: dict[str, ArmRecord]
    shared_lr: Rate | None
    chosen_lr: dict[str, Rate]
    runs: list[SpecRecord]
    sweep: list[SpecRecord]
    failures: list[FailureRecord]
    history: NotRequired[list[DeclarationRecord]]  # absent from older records


class SavedModelConfig(TypedDict):
    max_seq_len: Positive


class RunConfig(TypedDict):
    """What a report needs of config.yaml, whose version may be an older one."""

    model: SavedModelConfig


class DecodeRow(TypedDict):
    """What a token of an arm costs at one place (harness/study/decode_times.py)."""

    arm: str
    context: Positive
    batch: Positive
    milliseconds: Figure
    low: Figure
    high: Figure
    n: NotRequired[Positive]  # steps timed
    device: str
    path: str  # how MLA's attention.decode computes one token: absorbed or expand; auto for the others
    cache_bytes_per_token: NotRequired[Figure]  # all layers
    step: NotRequired[str]  # eager, or graph on CUDA


class DecodePlaces(TypedDict):
    """What a study wants to know of decoding."""

    arms: list[str]
    contexts: list[Positive]
    batch_sizes: list[Positive]


class DecodeTimes(TypedDict):
    rows: list[DecodeRow]
    asked: NotRequired[DecodePlaces]  # absent from older records


FIGURES = declared(Evaluation, Shown)  # of a run, what is shown wherever figures are
# What no evaluation lacks, of whatever version: without one of these the summary's would stand in its place.
_SCORED = ("dataset", "split", "data_fingerprint", "evaluated_tokens", "loss", "perplexity", "bits_per_byte")


def save(path: Path, kind: type[Any], record: Mapping[str, Any]) -> None:
    """Write a record of this kind, whole or not at all. Raises AssertionError, and writes nothing, where a reader would
    refuse it: then what made it is wrong, and no file is damaged."""
    try:
        typed(kind, record, "")
    except UserError as error:
        raise AssertionError(f"{path.name} would be no {kind.__name__}: {error}") from error
    write_json(path, record)


def evaluation_files(run: Path) -> list[Path]:
    """By name. Raises UserError where they cannot be listed."""
    return [path for path in listed(run / "evaluations") if path.suffix == ".json"]


def when_made(record: Mapping[str, Any]) -> str:
    """The record's own time, ISO 8601 in UTC, which sorts as text; nothing in older records."""
    return str(record.get("finished_at") or "")


def read_summary(run: Path, *needed: str) -> RunSummary:
    """A finished run's summary.json."""
    return cast(RunSummary, _read(run / "summary.json", RunSummary, needed))


def read_evaluation(path: Path) -> Evaluation:
    """An Evaluation, with the name of its file, without ending, as "record"."""
    record = cast(Evaluation, PLAIN_CACHE | _read(path, Evaluation, _SCORED))
    if record["through_cache"] and "cache_dtype" not in record:
        raise _refused(path, "through_cache=true, and no cache_dtype")
    for kind in ("extras", "extras_without_cache"):
        extras = cast("dict[str, Any]", record.get(kind) or {})
        for extra, figures in extras.items():
            if not isinstance(figures, (dict, NoneType)):
                raise _refused(path, f"{kind}.{extra}={shown(figures)} must be a group of fields")
            for figure, value in (figures or {}).items():
                if isinstance(value, str):
                    raise _refused(path, f'{kind}.{extra}.{figure}="{value}" must be a finite number, without quotes')
    record["record"] = path.stem
    return record


def read_evaluations(run: Path) -> list[Evaluation]:
    """The run's records, the oldest first by their own time; those without one come before them, by name."""
    return sorted(map(read_evaluation, evaluation_files(run)), key=when_made)


def read_config(run: Path) -> dict[str, Any]:
    """A run's config.yaml, a RunConfig."""
    try:
        return dict(typed(RunConfig, read_run_config(run), ""))
    except UserError as error:
        raise UserError(f"{run / 'config.yaml'} is not as it was written ({error}): restore it") from None


def read_segments(run: Path, evaluation: str) -> SegmentRecord | None:
    """What lies beside the evaluation of that name; None where nothing does."""
    path = run / "segments" / f"{evaluation}.json"
    if not path.is_file():
        return None
    segments = cast(SegmentRecord, _read(path, SegmentRecord))
    if len(segments["nats"]) != len(segments["bytes"]):
        raise _refused(path, f"{len(segments['nats'])} losses and {len(segments['bytes'])} sizes")
    if len(segments.get("documents", segments["nats"])) != len(segments["nats"]):
        raise _refused(path, f"{len(segments['nats'])} losses and {len(segments['documents'])} documents")
    return segments


def read_study(folder: Path) -> StudyRecord:
    """A study's record, whose parts fit together."""
    path = folder / STUDY_FILE
    if not path.is_file():
        raise UserError(f"{folder} holds no study.json, so it is no study: run one with python scripts/run_study.py study=...")
    record = cast(StudyRecord, _read(path, StudyRecord))
    if record["metric"] not in METRICS:
        raise _refused(path, f"metric={record['metric']} is none of {', '.join(METRICS)}")
    if not record["arms"]:
        raise _refused(path, "it has no arms")
    named = [(arm, "contrasts") for pair in record["contrasts"] for arm in pair]
    named += [(arm, "trends") for trend in record.get("trends", {}).values() for pair in trend["of"] for arm in pair]
    named += [(arm, "staircase") for arm in record["staircase"] or []]
    named += [(spec["arm"], kind) for kind in ("runs", "sweep") for spec in record[kind]]  # type: ignore[literal-required]
    for arm, where in named:
        if arm not in record["arms"]:
            raise _refused(path, f"{where} names {arm}, no arm of it")
    for a, b in record["contrasts"]:
        if a == b:
            raise _refused(path, f"contrasts compares {a} with itself")
    for kind in ("runs", "sweep"):
        names = [spec["name"] for spec in record[kind]]  # type: ignore[literal-required]
        if odd := [name for name in names if "/" in name or not stays_inside(name)]:
            raise _refused(path, f"{kind} names {odd[0]}, which is no folder of this study")
        if twice := [name for name in names if names.count(name) > 1]:
            raise _refused(path, f"{kind} names {twice[0]} twice")
    counted = [(spec["arm"], spec["seed"]) for spec in record["runs"]]
    if again := [f"arm {arm} and seed {seed}" for arm, seed in counted if counted.count((arm, seed)) > 1]:
        raise _refused(path, f"two of its runs are of {again[0]}")
    return record


def read_decode_times(folder: Path) -> DecodeTimes | None:
    """What a study's command has measured; None where it has not."""
    path = folder / DECODE_FILE
    return cast(DecodeTimes, _read(path, DecodeTimes)) if path.is_file() else None


def _read(path: Path, kind: type[_Kind], needed: Collection[str] = ()) -> dict[str, Any]:
    value = read_json(path, record=True)
    if lacking := [key for key in needed if key not in value]:
        raise UserError(f"{path} lacks {', '.join(lacking)}: {_REMEDY}")
    try:
        record: Mapping[str, Any] = typed(kind, value, "")
    except UserError as error:
        raise _refused(path, str(error)) from None
    return dict(record)


_REMEDY = "delete it and run the command that wrote it again"


def _refused(path: Path, reason: str) -> UserError:
    return UserError(f"{path} is not as it was written ({reason}): {_REMEDY}")
