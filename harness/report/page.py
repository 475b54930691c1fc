"""The report as one HTML file, from page.html.j2; every word of a study is escaped there.

Every picture is there twice, laid out for a wide and for a narrow page; the style sheet shows one. Pointing at something
that belongs to an arm lights that arm up in all pictures and tables.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from harness.report.colours import (
    COLOURS,
    DARK_INK,
    DARK_PAPER,
    GRID,
    INK,
    PALE,
    PAPER,
    QUIET,
    RULE,
    WORSE,
    darker,
    in_the_dark,
)
from harness.report.document import Section
from harness.report.findings import Findings
from harness.report.pictures import Picture
from harness.report.study_pictures import arm_styles
from harness.report.svg import as_svg, colour_variable, legend_sample

if TYPE_CHECKING:
    from markupsafe import Markup

WIDE, NARROW = 1020.0, 326.0  # CSS pixels: all panels side by side on a desk, and one below the other on a phone


def page(findings: Findings, parts: Sequence[Section]) -> str:
    """The whole document."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True
    )
    environment.filters["breakable"] = _breakable
    numbers = {arm.name: number for number, arm in enumerate(findings.arms)}
    pictures = [picture for section in parts for picture in section.pictures]
    return environment.get_template("page.html.j2").render(
        study=findings.results.record,
        notes=findings.notes,
        sections=parts,
        numbers=numbers,
        samples={arm: legend_sample(style, numbers[arm]) for arm, style in arm_styles(findings).items()},
        drawn={picture.name: _drawn(picture, numbers) for picture in pictures},
        colours=_colours(),
        ink=INK,
        quiet=QUIET,
        paper=PAPER,
        dark_ink=DARK_INK,
        dark_paper=DARK_PAPER,
        alarm=WORSE,
    )


def _drawn(picture: Picture, numbers: Mapping[str, int]) -> dict[str, Markup]:
    headings = "; ".join(heading for heading, _ in picture.panels if heading)
    label = f"{picture.title}: {headings}" if headings else picture.title
    widths = {"wide": (WIDE, len(picture.panels)), "narrow": (NARROW, 1)}
    return {
        kind: as_svg(picture, width, numbers, columns=columns, kind=kind, label=label)
        for kind, (width, columns) in widths.items()
    }


def _colours() -> list[tuple[str, str, str]]:
    """Variable, light and dark value of every colour that a picture may have."""
    inks = (INK, QUIET, RULE, GRID, PALE, PAPER)
    used = dict.fromkeys((*inks, *COLOURS, *map(darker, (INK, *COLOURS))))
    return [(colour_variable(colour), colour, in_the_dark(colour)) for colour in used]


def _breakable(text: str) -> Markup:
    """The name of a field may be broken at its joints."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"(?<=\w)([._])(?=\w)", r"\1<wbr>", str(escape(text))))
