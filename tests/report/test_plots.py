"""Pictures, whatever they show: no words cover one another or leave the picture, and a picture is the same each time."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.report.canvas import Drawing
from harness.report.colours import INK, PALE, Style
from harness.report.findings import Findings
from harness.report.forest_plot import _label, _layout
from harness.report.page import NARROW, WIDE
from harness.report.pictures import ForestPlot, ForestRow, Mark, Picture, Plot, Series
from harness.report.plot_labels import MOST_ASIDE, spread
from harness.report.plots import draw, save_png
from harness.report.sections import sections
from harness.report.svg import as_svg
from harness.study.results import load_results
from tests.support.study_runs import LEVELS, MANY, STAIRCASE, Truth, write_study

LONG = "a_name_of_an_arm_that_is_as_long_as_nobody_would_write_it_without_any_space"
HOSTILE = {
    '<b>a</b>&"x"': Truth("mha", 1.8, 2048),
    "m|l*a_`x`$y$ \x1b[2J": Truth("mla", 1.9, 640),
    LONG: Truth("mla", 1.84, 768),
}
HOSTILE_PAIR = list(HOSTILE)[:2]
STUDIES: dict[str, dict[str, Any]] = {
    "full": {"sweep": True, "decode": True, "staircase": STAIRCASE},
    "many": {"arms": MANY, "contrasts": [["r3", "r0"], ["r6", "r0"]], "sweep": True, "decode": True, "segments": 0},
    "levels": {"arms": LEVELS, "contrasts": [["mla_512", "gqa_512"]], "decode": True, "segments": 0},
    "hostile": {"arms": HOSTILE, "contrasts": [HOSTILE_PAIR], "sweep": True, "decode": True, "segments": 0},
    "one": {"seeds": (0,), "extras": False, "segments": 0},
}
Box = tuple[float, float, float, float]  # left, bottom, right, top


def pictures_of(folder: Path, **content: Any) -> list[Picture]:
    findings = Findings(load_results(write_study(folder, **content)))
    return [picture for section in sections(findings) for picture in section.pictures]


def words_of(drawing: Drawing) -> list[tuple[str, Box]]:
    """All words and what they cover."""
    from matplotlib.text import Text

    drawing.figure.draw_without_rendering()
    found = []
    for text in drawing.figure.findobj(Text):
        if text.get_visible() and text.get_text().strip():
            box = text.get_window_extent()
            found.append((text.get_text(), (box.x0 + 1, box.y0 + 2, box.x1 - 1, box.y1 - 2)))
    return found


def faults(drawing: Drawing) -> list[tuple[str, ...]]:
    """Pairs of words that overlap, and single ones that are not inside."""
    words, size = words_of(drawing), drawing.figure.bbox
    found: list[tuple[str, ...]] = [
        (word,) for word, (left, low, right, top) in words if left < -1 or low < -1 or right > size.x1 + 1 or top > size.y1 + 1
    ]
    for (a, one), (b, other) in itertools.combinations(words, 2):
        if one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]:
            found.append((a, b))
    return found


@pytest.mark.parametrize("study", STUDIES)
def test_no_words_of_a_picture_cover_one_another_or_leave_it(study: str, tmp_path: Path) -> None:
    pictures = pictures_of(tmp_path / study, **STUDIES[study])
    assert len(pictures) >= 3
    for picture in pictures:
        for width, columns in ((WIDE, len(picture.panels)), (NARROW, 1)):
            assert faults(draw(picture, width, columns=columns)) == [], (picture.name, width)


def test_points_of_one_size_stand_side_by_side_near_their_place() -> None:
    points = [(512.0, 1.72), *((896.0, 1.719 - 0.001 * i) for i in range(8))]
    series = [Series(f"arm_{i}", Style("#0072b2"), [Mark(x, y, y - 0.004, y + 0.004)]) for i, (x, y) in enumerate(points)]
    plot = Plot("bytes", "bits", series, x_log=True, x_ticks=[512, 896], front=[points[0], points[-1]])
    (axes,) = draw(Picture("front", "", "", [("", plot)]), WIDE).figure.axes
    lines = [container.lines[0] for container in axes.containers]  # type: ignore[attr-defined]
    shown = [line.get_transform().transform(line.get_xydata())[0, 0] for line in lines][1:]
    assert 0 < max(shown) - min(shown) <= MOST_ASIDE + 0.001
    assert len(np.unique(np.round(shown, 2))) == 8


def test_labels_are_moved_apart_as_little_as_needed_and_stay_in_order() -> None:
    assert spread([10, 50, 90], 12, 0, 100) == [10, 50, 90]
    assert spread([50, 50], 12, 0, 100) == [44, 56]
    assert spread([98, 99, 100], 12, 0, 100) == [76, 88, 100]
    moved = spread([1, 2, 3, 60, 61], 12, 0, 100)
    assert moved == sorted(moved)
    assert min(np.diff(moved)) >= 12 - 1e-9


@pytest.mark.parametrize(("number", "colour", "words"), [(0, PALE, {"gqa", "mqa"}), (1, INK, {"mla − gqa", "mla_plain − mha"})])
def test_no_line_strikes_a_word_through(number: int, colour: str, words: set[str], tmp_path: Path) -> None:
    """The front of the Pareto picture and the level of the forest plot pass behind words, which stand on paper."""
    picture = pictures_of(tmp_path / "study", contrasts=[["mla", "gqa"], ["mla_plain", "mha"]])[number]
    for width in (NARROW, WIDE):
        (axes,) = draw(picture, width).figure.axes
        long = [line for line in axes.lines if line.get_color() == colour and line.get_linestyle() == "-"]
        texts = [text for text in axes.texts if text.get_text().strip() in words]
        assert long and len(texts) == len(words)
        for text in texts:
            behind = text.get_bbox_patch()
            assert behind is not None and behind.get_facecolor() == (1, 1, 1, 1)
            assert text.get_zorder() > min(line.get_zorder() for line in long)


def test_a_picture_is_the_same_to_the_byte_whatever_a_matplotlibrc_says(tmp_path: Path) -> None:
    import matplotlib

    picture = pictures_of(tmp_path / "study", seeds=(0, 1), extras=False, segments=0)[0]
    found = []
    for number, settings in enumerate(({}, {"font.size": 30, "text.parse_math": True, "svg.fonttype": "path"})):
        with matplotlib.rc_context(settings):
            save_png(picture, tmp_path / f"{number}.png")
            svg = as_svg(picture, WIDE, {"mha": 0}, columns=1, kind="wide", label="x")
        found.append(((tmp_path / f"{number}.png").read_bytes(), str(svg)))
    assert found[0] == found[1]
    assert found[0][0].startswith(b"\x89PNG") and not [*tmp_path.glob("*unfinished*")]


def test_a_row_that_has_room_for_its_name_beside_it_has_it_in_one_line() -> None:
    """Of any length: 24 letters of 6.6 divided by 6.6 are 23.9..., and the words of two rows lay on one another."""
    for length in range(8, 60):
        panel = ForestPlot("", [ForestRow("a " + "b" * (length - 2), ("a", "b"), "", "+0.1", 0.1)])
        layout = _layout(panel, 2000.0)
        assert layout.beside and "\n" not in _label(panel.rows[0], layout.room), length
