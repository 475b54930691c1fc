"""The verdicts of a study from its report.csv alone, for one whose runs are no longer here: as text, under the rules of today.

What descends from which runs, what was converted and what was declared is read from the study's YAML.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from harness.errors import UserError
from harness.evaluation.metric import BITS_PER_BYTE, LOSS, METRICS
from harness.files.text import aligned, counted
from harness.files.untrusted import Unreadable
from harness.report.colours import styles
from harness.report.document import ABSENT, mean_text
from harness.report.findings import per_token_at_length
from harness.report.pictures import Picture
from harness.report.study_pictures import PlacedArm, quality_by_cache, trends_picture
from harness.study.plan import build_plan, load_study
from harness.study.results import AT_LENGTH
from harness.study.statistics import Pair, contrasts, equal_variances, mean_interval, origins, residual_deviation, trends

_Kind = TypeVar("_Kind", str, int, float)


def restated(
    file: Path, study: str, pairs: Sequence[Pair] = (), shown: Sequence[str] = ()
) -> tuple[str, Picture, Picture | None]:
    """A table of the arms, then a sentence for each contrast and trend of configs/study/<study>.yaml, and each of `pairs`;
    the picture of quality against cache, of the arms `shown` or of all; and that of the trends, if the study has any.

    Raises UserError for a file that is no report.csv of such a study, and as `contrasts` does.
    """
    config = load_study(study)
    metric = METRICS[config.metric]
    try:
        values, usual, at_length = _figures(file, [metric.name, LOSS.name, BITS_PER_BYTE.name])
    except (OSError, Unreadable) as error:
        raise UserError(f"{file} cannot be read as a study's report.csv ({error}): name the one of study={study}") from None
    arms = values[metric.name]
    if strange := [arm for arm in arms if arm not in config.arms]:
        raise UserError(
            f"{file} has an arm {strange[0]}, and study={study} has none of that name: name the study that it is of"
        )

    if strange := [arm for arm in shown if arm not in arms]:
        raise UserError(f"{file} has no arm {strange[0]} to show: it has {', '.join(arms)}")

    lineages = origins({name: arm.starts_from for name, arm in config.arms.items()})
    kinds: dict[str, Any] = {"apart": [arm for arm in arms if config.arms[arm].convert is not None], "lineages": lineages}
    sigma, dof = residual_deviation(arms, **kinds)
    unequal = equal_variances(arms, **kinds)
    declared = [(a, b) for a, b in config.contrasts if a in arms and b in arms]
    margins = {metric.name: config.margin}
    found = {
        name: contrasts(of_metric, primary=declared, other=pairs, margin=margins.get(name), **kinds)
        for name, of_metric in values.items()
    }

    placed = []
    rows_of_arms = [["arm", "seeds", *(METRICS[name].label for name in values), "deviation"]]
    for arm in arms:
        means = {name: mean_interval(of_metric, arm, **kinds) for name, of_metric in values.items()}
        mean, stated = means[metric.name], config.arms[arm]
        if not shown or arm in shown:
            placed.append(PlacedArm(arm, stated.reference, mean, mean.n))
        deviation = mean.deviation
        cells = [mean_text(mean, METRICS[name]) for name, mean in means.items()]
        rows_of_arms.append([arm, str(len(arms[arm])), *cells, ABSENT if deviation is None else f"{deviation:.2g}"])
    lines = [*aligned(rows_of_arms), ""]
    if sigma is not None:
        lines.append(f"deviation of a run, pooled: {sigma:.2g} {metric.unit}, {counted(dof, 'degree')} of freedom")
    if unequal is not None:
        lines.append(f"Bartlett's test of equal variances: p = {unequal:.3f}")
    for place, contrast in enumerate(found[metric.name]):
        also = {name: of_metric[place] for name, of_metric in found.items() if name != metric.name}
        lines.append(f"{contrast.sentence(metric, also)}.")
    # Sizes are those of composed arms, whose names alone stand in the file.
    planned = build_plan(config, name=study, command="", runs_dir=file.parent).trends if config.trends else {}
    whole = {key: trend for key, trend in planned.items() if all(arm in arms for pair in trend["of"] for arm in pair)}
    slopes = trends(arms, {key: (each["of"], each["at"]) for key, each in whole.items()}, **kinds)
    sizes = {name: trend["over"] for name, trend in whole.items()}
    lines += [f"{trend.sentence(metric, sizes[trend.name])}." for trend in slopes]
    looks = styles({name: arm.family for name, arm in config.arms.items()})
    by_cache = quality_by_cache(placed, looks, usual, per_token_at_length(usual, at_length), metric)
    return "\n".join(lines), by_cache, trends_picture(slopes, sizes, metric) if slopes else None


def _figures(
    file: Path, metrics: Sequence[str]
) -> tuple[dict[str, dict[str, dict[int, float]]], dict[str, float], dict[str, float | None]]:
    """metric -> arm -> seed -> figure, and cache bytes per token of each arm, at its own context and at LENGTH.

    Raises OSError, or Unreadable for what is no such file.
    """
    values: dict[str, dict[str, dict[int, float]]] = {name: {} for name in metrics}
    usual: dict[str, float] = {}
    at_length: dict[str, float | None] = {}
    for row in _rows(file):
        if _cell(row, "kind", str) == "study":
            arm, seed = _cell(row, "arm", str), _cell(row, "seed", int)
            if seed in values[metrics[0]].get(arm, {}):
                raise Unreadable(f"two rows of arm {arm}, seed {seed}")
            usual[arm] = _size(row, "cache_bytes_per_token")
            at_length[arm] = _size(row, AT_LENGTH) if row.get(AT_LENGTH) else None
            for name, of_metric in values.items():
                of_metric.setdefault(arm, {})[seed] = _cell(row, f"test_{name}", float)
    return values, usual, at_length


def _rows(file: Path) -> list[dict[str, str]]:
    """Raises OSError, or Unreadable for what is no CSV in UTF-8."""
    with file.open(newline="", encoding="utf-8") as opened:
        try:
            return list(csv.DictReader(opened))
        except (UnicodeDecodeError, csv.Error) as error:
            raise Unreadable(str(error)) from None


def _size(row: Mapping[str, str], column: str) -> float:
    """Bytes that have a place on a logarithmic scale. Raises Unreadable for others."""
    size = _cell(row, column, float)
    if not 0 < size < math.inf:
        raise Unreadable(f"{column}={size:g} of arm {row['arm']}")
    return size


def _cell(row: Mapping[str, str], column: str, kind: type[_Kind]) -> _Kind:
    """Raises Unreadable where there is none of this kind."""
    try:
        return kind(row[column])
    except (KeyError, TypeError, ValueError):
        raise Unreadable(f"{column}={row.get(column)}") from None
