"""A study as its YAML states it, and what follows from it: arms with solved sizes, and the runs that each phase needs.

configs/study/<name>.yaml holds a base setup and arms, both as train_model.py's overrides, the seeds, what is matched, and
the contrasts declared before anything runs. A run of a study is an ordinary run, <runs_dir>/<study>/<arm>-lr<rate>-seed<n>:
its name says all that tells it from the others of its study.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import operator
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from harness.config.checks import RUN_NAME
from harness.config.compose import load_eval_config, load_train_config, options_of
from harness.config.conversion import ConversionConfig
from harness.config.identity import setup_hash
from harness.config.places import CONFIGS
from harness.config.schema import BudgetConfig, TrainConfig
from harness.config.typed import did_you_mean, typed
from harness.data import Tokenizer
from harness.data.prepare import local_tokenizer
from harness.errors import UserError
from harness.evaluation.metric import METRICS
from harness.files.lock import locked
from harness.files.untrusted import Count, Positive, Rate
from harness.runs.conversion import conversion_setup, converted_from
from harness.runs.folder import finished
from harness.runs.records import (
    STUDY_FILE,
    DeclarationRecord,
    FailureRecord,
    MatchRecord,
    SpecRecord,
    StudyRecord,
    TrendRecord,
    read_study,
    save,
)
from harness.study.matching import MatchConfig, match_arm, quantities
from harness.study.tuning import as_named, first_grid
from harness.training.schedule import training_steps


@dataclass
class ArmConfig:
    """One line of a comparison: overrides on the study's base."""

    family: str  # what it is drawn as: mha, gqa, mqa, mla
    overrides: list[str] = field(default_factory=list)
    level: str | None = None  # of the budget that it fills, where a study has several
    reference: bool = False  # beside the comparison, not in it
    match: list[MatchConfig] | None = None  # None: the study's
    starts_from: str | None = None  # an arm whose run of the same seed gives the weights
    convert: dict[str, Any] | None = None  # what is made of them without training (ConversionConfig); None: trained on


TUNING_SEED = 1000  # a rate chosen on a seed that is scored would be chosen on what it is judged by


@dataclass
class TuneConfig:
    """tune=lr: validation loss at several rates for every arm, the same number of them."""

    factors: list[float]  # of the base's rate
    seed: Count | None = None  # of the sweep, none of those that are scored; None: TUNING_SEED
    extensions: Count = 2  # how often the grid grows, for all arms, while one arm's optimum is at its edge
    tokens: Positive | None = None  # of a sweep's run; None: the study's own budget
    transfer_arms: list[str] = field(default_factory=list)  # swept at the full budget too, where the sweep's is shorter


@dataclass
class TrendConfig:
    """How differences change with a size: the slope of a - b over log2 of it."""

    of: list[list[str]]  # [a, b]: a minus b, two arms of one size
    over: str = "model.d_model"  # a number of their configuration


@dataclass
class StudyConfig:
    """configs/study/*.yaml, whole."""

    question: str
    base: list[str]
    arms: dict[str, ArmConfig]
    seeds: list[int]
    contrasts: list[list[str]] = field(default_factory=list)  # [a, b]: a minus b, declared beforehand
    trends: dict[str, TrendConfig] = field(default_factory=dict)  # by what they are called; declared beforehand too
    margin: Rate | None = None  # arms that differ by less are the same, in the metric's unit; None: not tested
    primary_seeds: list[int] | None = None  # of the arms in contrasts; None: as the others
    match: list[MatchConfig] = field(default_factory=list)  # solved in this order, each on top of the ones before
    staircase: list[str] = field(default_factory=list)  # arms in the order of their changes
    tune: TuneConfig | None = None
    metric: str = "bits_per_byte"  # of METRICS (metric.py), of the test split
    evaluate: list[str] = field(default_factory=list)  # overrides of eval_model.py
    decode_contexts: list[Positive] = field(default_factory=list)  # tokens; decode time per token is measured there
    decode_batch_sizes: list[Positive] = field(default_factory=lambda: [1, 8])

    def seeds_of(self, arm: str) -> list[int]:
        """More of them for arms that a declared contrast is about."""
        pairs = [*self.contrasts, *(pair for trend in self.trends.values() for pair in trend.of)]
        primary = {name for pair in pairs for name in pair}
        return (self.primary_seeds if arm in primary else None) or self.seeds


@dataclass(kw_only=True)
class Arm(ArmConfig):
    """An arm whose sizes are solved, the overrides that do it behind its own, at the base's learning rate."""

    config: TrainConfig
    quantities: dict[str, int]  # params, train_flops, kv_bytes
    matches: list[MatchRecord]

    @property
    def described(self) -> list[str]:
        """Its overrides, and where its weights come from."""
        source = [] if self.starts_from is None else [f"starts_from={self.starts_from}"]
        return [*source, *(f"{key}={value}" for key, value in (self.convert or {}).items()), *self.overrides]


@dataclass(frozen=True)
class RunSpec:
    """One run: an arm at a rate, a seed and perhaps a budget of its own."""

    arm: str
    lr: float
    seed: int
    tokens: int  # that it trains on
    budget: int | None  # budget.tokens, where it is not the study's
    setup_hash: str
    source: str | None = None  # the run whose weights it takes over

    @property
    def name(self) -> str:
        """Of its folder."""
        short = "" if self.budget is None else f"-tokens{self.budget}"
        return f"{self.arm}-lr{self.lr:.3g}{short}-seed{self.seed}"

    def record(self) -> SpecRecord:
        """As it stands in study.json."""
        return cast(SpecRecord, dataclasses.asdict(self) | {"name": self.name})


@dataclass(frozen=True)
class StudyPlan:
    """A study ready to run in a folder of its own."""

    name: str
    command: str
    folder: Path
    config: StudyConfig
    arms: dict[str, Arm]
    shared_lr: float | None  # None: the arms say different ones
    trends: dict[str, TrendRecord]  # by what they are called

    @property
    def first(self) -> TrainConfig:
        """The first arm's configuration, for what the base sets for all of them."""
        return next(iter(self.arms.values())).config

    @property
    def tuning_seed(self) -> int:
        """Of the sweep's runs."""
        given = None if self.config.tune is None else self.config.tune.seed
        return TUNING_SEED if given is None else given

    def recorded(self) -> StudyRecord | None:
        """What earlier commands have written of the study in this folder; None where none has."""
        return read_study(self.folder) if (self.folder / STUDY_FILE).is_file() else None

    def untuned_rates(self, arms: Iterable[str]) -> dict[str, float]:
        """What each of them says itself."""
        return {arm: self.arms[arm].config.optimizer.lr for arm in arms}

    def first_rates(self) -> list[float]:
        """Of the sweep, before it grows."""
        assert self.shared_lr is not None and self.config.tune is not None, "a plan with a sweep has one rate to begin at"
        return first_grid(self.shared_lr, self.config.tune.factors)

    def spec(self, arm: str, lr: float, seed: int, budget: int | None = None) -> RunSpec:
        """A run of this study. The rate counts with three significant digits, as in the run's name."""
        lr = as_named(lr)
        config, source = self._config(arm, lr, budget), self._source(arm, seed)
        steps = training_steps(config) if self.arms[arm].convert is None else 0
        tokens = config.batch_size * config.model.max_seq_len * steps
        return RunSpec(arm, lr, seed, tokens, budget, setup_hash(config), None if source is None else source.name)

    def _config(self, arm: str, lr: float, budget: int | None = None) -> TrainConfig:
        """What a run of this arm will hold, but for its seed and its place."""
        config, source = self.arms[arm].config, self.arms[arm].starts_from
        if source is not None:
            begun = self._config(source, as_named(self.untuned_rates([source])[source]))
            if self.arms[arm].convert is not None:
                way = conversion_setup(begun, _conversion(arm, self.arms[arm].convert))
                return dataclasses.replace(begun, attention=config.attention, init_setup=way)
            config = dataclasses.replace(config, init_setup=setup_hash(begun))
        config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, lr=lr))
        return config if budget is None else dataclasses.replace(config, budget=BudgetConfig(tokens=budget))

    def _source(self, arm: str, seed: int) -> RunSpec | None:
        source = self.arms[arm].starts_from
        return None if source is None else self.spec(source, self.untuned_rates([source])[source], seed)

    def sweep_runs(self, rates: Sequence[float], arms: Sequence[str]) -> list[RunSpec]:
        """These arms at each of the rates, on the seed and the budget of the sweep."""
        assert self.config.tune is not None
        return [self.spec(arm, lr, self.tuning_seed, self.config.tune.tokens) for lr in rates for arm in arms]

    def transfer_runs(self, rates: Sequence[float], arms: Collection[str]) -> list[RunSpec]:
        """Of these arms those that are swept at the study's own budget too."""
        tune = self.config.tune
        swept = tune.transfer_arms if tune is not None and tune.tokens is not None else ()
        return [self.spec(arm, lr, self.tuning_seed) for arm in swept if arm in arms for lr in rates]

    def main_runs(self, lr: Mapping[str, float], arms: Iterable[str]) -> list[RunSpec]:
        """Every seed of these arms at their rates, seed by seed: a study cut short has its first seeds whole."""
        specs = [self.spec(arm, lr[arm], seed) for arm in arms for seed in self.config.seeds_of(arm)]
        return sorted(specs, key=lambda spec: spec.seed)

    def conversion(self, spec: RunSpec) -> list[str] | None:
        """The arguments of scripts/convert.py for a run that it makes; None for one that is trained."""
        options = self.arms[spec.arm].convert
        if options is None:
            return None
        first = self.arms[spec.arm].config
        return [
            f"run={self.folder / str(spec.source)}",
            f"to={self.folder / spec.name}",
            f"device={first.device}",
            f"data_dir={first.data_dir}",
            *(f"{key}={value}" for key, value in options.items()),
        ]

    def overrides(self, spec: RunSpec) -> list[str]:
        """The arguments of train_model.py for a run. In a tracker all seeds of an arm are one group."""
        begun = [] if spec.source is None else [f"init_from={self.folder / spec.source}"]
        budget = [] if spec.budget is None else [f"budget.tokens={spec.budget}", "budget.steps=null"]
        arm = self.arms[spec.arm]
        tracking = [f"tracking.group={spec.arm}", f"tracking.tags=['{self.name}','{arm.family}']"]
        return merged(
            [
                *tracking,
                *self.config.base,
                *arm.overrides,
                f"optimizer.lr={spec.lr:.3g}",
                f"seed={spec.seed}",
                *budget,
                f"name={spec.name}",
                f"runs_dir={self.folder}",
                *begun,
            ]
        )


def _conversion(arm: str, options: Any) -> ConversionConfig:
    conversion: ConversionConfig = typed(ConversionConfig, options, f"arms.{arm}.convert")
    return conversion


def merged(overrides: Sequence[str]) -> list[str]:
    """Of several overrides of one field the last, in the place of the first: an arm's before the base's."""
    last = {override.partition("=")[0]: override for override in overrides}
    return list(last.values())


def load_study(study: str, folder: Path | None = None) -> StudyConfig:
    """configs/study/<study>.yaml, checked. Raises UserError for what it says wrong."""
    import yaml

    path = (folder or CONFIGS / "study") / f"{study}.yaml"
    if not path.is_file():
        raise UserError(f"study={study} does not exist; {did_you_mean(study, options_of('study'))}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    config: StudyConfig = typed(StudyConfig, _flat(content), "")
    _check(config, study)
    return config


def _flat(content: Any) -> Any:
    """A study's YAML with lists inside an arm's overrides taken apart: several arms share one by an anchor."""
    arms = content.get("arms") if isinstance(content, dict) else None
    for arm in arms.values() if isinstance(arms, dict) else ():
        if isinstance(arm, dict) and isinstance(overrides := arm.get("overrides"), list):
            arm["overrides"] = [one for item in overrides for one in (item if isinstance(item, list) else [item])]
    return content


def _check(config: StudyConfig, study: str) -> None:
    """What can be refused without composing anything."""
    if not config.arms or not config.seeds:
        raise UserError(f"study={study} needs at least one arm and one seed")
    named = [(name, "contrasts") for pair in config.contrasts for name in pair]
    named += [(name, f"trends.{key}") for key, trend in config.trends.items() for pair in trend.of for name in pair]
    named += [(name, "staircase") for name in config.staircase]
    named += [(arm.starts_from, f"arms.{name}.starts_from") for name, arm in config.arms.items() if arm.starts_from]
    named += [(name, "tune.transfer_arms") for name in (config.tune.transfer_arms if config.tune else [])]
    for name, where in named:
        if name not in config.arms:
            raise UserError(f"{where} of study={study} names {name}, no arm of it; {did_you_mean(name, [*config.arms])}")
    for name, arm in config.arms.items():
        before = [name]
        while (source := config.arms[before[-1]].starts_from) is not None:
            if source in before:
                raise UserError(f"arms of study={study} start from one another: {' from '.join([*before, source])}")
            before.append(source)
        if arm.convert is not None and (arm.starts_from is None or arm.overrides or arm.match):
            raise UserError(
                f"arm {name} of study={study} is converted, not trained: it needs starts_from, and neither overrides nor match"
            )
    if config.tune is not None and any(arm.starts_from for arm in config.arms.values()):
        raise UserError(
            f"study={study} sweeps learning rates, and some of its arms start from others, whose runs would have to be swept "
            f"first: leave tune out"
        )
    if wrong := [pair for pair in config.contrasts if len(pair) != 2 or pair[0] == pair[1]]:
        raise UserError(f"contrasts={wrong[0]} of study={study} must name two different arms: [a, b] is a minus b")
    for where, pairs in (("contrasts", config.contrasts), ("staircase", [*itertools.pairwise(config.staircase)])):
        if len({frozenset(pair) for pair in pairs}) < len(pairs) or any(a == b for a, b in pairs):
            raise UserError(
                f"{where} of study={study} must compare two arms once only, whichever stands first, and none with itself"
            )
    for key, trend in config.trends.items():
        arms = [name for pair in trend.of for name in pair]
        if len(trend.of) < 2 or any(len(pair) != 2 for pair in trend.of) or len({*arms}) < len(arms):
            raise UserError(
                f"trends.{key}.of={trend.of} of study={study} must be two pairs [a, b] or more, with every arm in one of them"
            )
    for seeds in (config.seeds, config.primary_seeds or [0]):
        if len(set(seeds)) != len(seeds) or min(seeds) < 0:
            raise UserError(f"seeds={seeds} of study={study} must be different whole numbers from 0 on")
    for name, arm in config.arms.items():
        if arm.starts_from is not None and (without := {*config.seeds_of(name)} - {*config.seeds_of(arm.starts_from)}):
            raise UserError(
                f"arm {name} of study={study} starts from {arm.starts_from}, which has no run of seed {min(without)}: leave "
                f"primary_seeds out, or name {arm.starts_from} in a contrast too"
            )
    if config.metric not in METRICS:
        raise UserError(f"metric={config.metric} of study={study} is unknown; {did_you_mean(config.metric, [*METRICS])}")
    if config.tune is not None and (
        len(config.tune.factors) < 3 or sorted(set(config.tune.factors)) != config.tune.factors or config.tune.factors[0] <= 0
    ):
        raise UserError(f"tune.factors={config.tune.factors} of study={study} must be three or more, positive and rising")


def build_plan(config: StudyConfig, *, name: str, command: str, runs_dir: Path) -> StudyPlan:
    """Compose every arm and solve what is matched. Writes nothing.

    Raises UserError when an arm or the evaluation does not compose, or a mismatch achieved is above its tolerance.
    """
    if not re.fullmatch(RUN_NAME, name):
        raise UserError(f"name={name} must be one plain folder name: letters, digits and . _ = , + - only")
    scoring = load_eval_config(merged(config.evaluate))  # refused before hours of training, not after
    if scoring.split != "test" or scoring.dataset is not None or scoring.cache.scores:
        raise UserError(
            f"evaluate={config.evaluate}: a study judges its runs on the test split of their own corpus, without a cache; "
            f"leave that out, and score them otherwise afterwards: python eval_model.py run=all runs_dir=..."
        )
    probe = METRICS[config.metric].probe
    if probe is not None and probe not in scoring.extras:
        raise UserError(f"metric={config.metric} is measured by {probe}: name it in the extras of evaluate={config.evaluate}")
    arms: dict[str, Arm] = {}
    for arm_name, arm in _in_order(config):
        source = None if arm.starts_from is None else arms[arm.starts_from].config
        overrides, matches = list(arm.overrides), list[MatchRecord]()
        if arm.convert is not None:
            assert source is not None
            composed = converted_from(source, _conversion(arm_name, arm.convert))
        else:
            composed = load_train_config(merged([*config.base, *overrides, f"name={arm_name}"]), source)
        vocabulary = vocabulary_of(composed)
        if source is None:  # otherwise the shape comes with the weights
            solved, matches = match_arm(
                arm_name,
                composed,
                config.match if arm.match is None else arm.match,
                vocab_size=vocabulary,
                others={name: done.quantities for name, done in arms.items()},
            )
            overrides += solved
            if solved:
                composed = load_train_config(merged([*config.base, *overrides, f"name={arm_name}"]))
        stated = vars(arm) | {"overrides": overrides}
        arms[arm_name] = Arm(**stated, config=composed, quantities=quantities(composed, vocabulary), matches=matches)
    arms = {arm_name: arms[arm_name] for arm_name in config.arms}
    trends = {key: _trend(key, trend, arms) for key, trend in config.trends.items()}
    rates = {arm.config.optimizer.lr for arm in arms.values() if arm.starts_from is None}
    if len(rates) > 1 and config.tune is not None:
        raise UserError(
            f"the arms say different learning rates {sorted(rates)}, and a sweep tries the same ones for every arm: set "
            f"optimizer.lr in the base only, or take tune: out of the study's YAML"
        )
    return StudyPlan(name, command, runs_dir / name, config, arms, rates.pop() if len(rates) == 1 else None, trends)


def _trend(name: str, trend: TrendConfig, arms: Mapping[str, Arm]) -> TrendRecord:
    """A declared trend with the size of each pair. Raises UserError for arms of one pair that differ in it, or all alike."""
    sizes = []
    for a, b in trend.of:
        try:
            found = [operator.attrgetter(trend.over)(arms[arm].config) for arm in (a, b)]
        except AttributeError:
            raise UserError(
                f"trends.{name}.over={trend.over} is no field of a run's configuration, such as model.d_model"
            ) from None
        if found[0] != found[1] or isinstance(found[0], bool) or not isinstance(found[0], int) or found[0] < 1:
            raise UserError(
                f"trends.{name}: {trend.over} is {found[0]} in {a} and {found[1]} in {b}: the arms of a pair need one size, a "
                f"whole number from 1 on"
            )
        sizes.append(found[0])
    if len({*sizes}) < 2:
        raise UserError(f"trends.{name}: {trend.over} is {sizes[0]} in all pairs: a trend needs two sizes at least")
    return {"over": trend.over, "of": [(a, b) for a, b in trend.of], "at": sizes}


def _in_order(config: StudyConfig) -> list[tuple[str, ArmConfig]]:
    """Arms that others are matched to come before them, and those that others start from."""
    named = {match.to for arm in config.arms.values() for match in (config.match if arm.match is None else arm.match)}

    def depth(arm: ArmConfig) -> int:
        return 0 if arm.starts_from is None else 1 + depth(config.arms[arm.starts_from])

    return sorted(config.arms.items(), key=lambda item: (depth(item[1]), item[0] not in named))


def vocabulary_of(config: TrainConfig) -> int:
    """What the tokenizer's configuration says, or the tokenizer.json that it names. Raises UserError for one on the hub."""
    if config.tokenizer.name == "bytes":
        return 257
    if config.tokenizer.vocab_size is not None:
        return config.tokenizer.vocab_size
    assert config.tokenizer.path is not None
    file = local_tokenizer(config.tokenizer.path)
    if file is None:
        raise UserError(
            f"tokenizer.path={config.tokenizer.path} is a name on the hub, and a study matches sizes before it fetches "
            f"anything: download its tokenizer.json and name that, or its folder, with tokenizer.path=..."
        )
    return Tokenizer.load(file).vocab_size


@contextlib.contextmanager
def record_alone(plan: StudyPlan) -> Iterator[None]:
    """Nobody else reads and rewrites the record meanwhile: commands for different arms may end at once. Waits for it."""
    plan.folder.mkdir(parents=True, exist_ok=True)
    with locked(plan.folder / ".record.lock"):
        yield


def write_record(
    plan: StudyPlan,
    *,
    chosen_lr: Mapping[str, float],
    specs: Sequence[RunSpec],
    sweep: Sequence[RunSpec],
    failures: Sequence[FailureRecord],
    history: Sequence[DeclarationRecord] = (),
) -> None:
    """study.json, all that the report needs beside the runs: whole or not at all."""
    config, before = plan.config, plan.recorded()
    earlier = {} if before is None else before.get("dropped_trends", {}) | before.get("trends", {})
    record: StudyRecord = {
        "name": plan.name,
        "question": config.question,
        "command": plan.command,
        "metric": config.metric,
        "base": config.base,
        "contrasts": [(a, b) for a, b in config.contrasts],
        "trends": plan.trends,
        "dropped_trends": {name: trend for name, trend in earlier.items() if name not in plan.trends},
        "margin": config.margin,
        "staircase": config.staircase,
        "arms": {
            name: {
                "family": arm.family,
                "level": arm.level,
                "reference": arm.reference,
                "overrides": arm.described,
                "setup_hash": setup_hash(arm.config),
                "quantities": arm.quantities,
                "converted": arm.convert is not None,
                "match": arm.matches,
            }
            for name, arm in plan.arms.items()
        },
        "shared_lr": plan.shared_lr,
        "chosen_lr": dict(chosen_lr),
        "runs": [spec.record() for spec in specs],
        "sweep": [spec.record() for spec in sweep],
        "failures": [*failures],
        "history": [*history],
    }
    save(plan.folder / STUDY_FILE, StudyRecord, record)


def settle_tuning_seed(plan: StudyPlan) -> None:
    """The seed of the sweep: of one that the folder holds already that one's, whichever it is.

    Raises UserError for a new sweep on a seed that is scored.
    """
    tune = plan.config.tune
    if tune is None:
        return
    record = plan.recorded()
    if record is not None and record["sweep"]:
        tune.seed = record["sweep"][0]["seed"]
        return
    if plan.tuning_seed in {seed for arm in plan.arms for seed in plan.config.seeds_of(arm)}:
        raise UserError(
            f"tune.seed={plan.tuning_seed} of {plan.name} is one of the seeds that are scored, and a rate must not be chosen "
            f"on what it is judged by: leave tune.seed out ({TUNING_SEED} is taken), or choose other seeds"
        )


def check_same_study(plan: StudyPlan) -> None:
    """Raises UserError when the folder holds another study: an arm of the same name that is something else, or, beside results,
    such a trend, which may have been dropped meanwhile."""
    record = plan.recorded()
    before = {} if record is None else record["arms"]
    changed = [
        name for name, arm in plan.arms.items() if name in before and before[name]["setup_hash"] != setup_hash(arm.config)
    ]
    if changed:
        old, new = before[changed[0]]["overrides"], plan.arms[changed[0]].described
        same = json.dumps(old) == json.dumps(new)
        difference = "the base differs" if same else f"{' '.join(old)} there, {' '.join(new)} here"
        raise UserError(
            f"{plan.folder} holds this study with another setup ({len(changed)} of its arms changed, the first is "
            f"{changed[0]}: {difference}): choose another name=..., or delete that folder"
        )
    there = {}
    if record is not None and (
        any(entry["results"] for entry in record.get("history", ()))
        or any(finished(plan.folder / run["name"]) for run in record["runs"])
    ):
        there = record.get("dropped_trends", {}) | record.get("trends", {})
    for name, trend in plan.trends.items():
        if name in there and there[name] != trend:
            raise UserError(
                f"{plan.folder} holds results, and trends.{name} is another trend there: what was declared before the first "
                f"result stays what it was; give this one a name of its own"
            )
