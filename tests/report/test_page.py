"""The page in a real browser: no word outside it, no request, no error, and what is pointed at lights up everywhere."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from harness.report import colours
from harness.report import page as page_of
from harness.report.write import write_report
from harness.study.results import load_results
from tests.support.study_runs import ARMS, TOKENS, Truth, write_study

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
in_a_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on PATH")

WIDTHS = (1280, 390, 360)
LONG = {"a_name_of_an_arm_that_is_as_long_as_nobody_would_write_it_without_any_space": Truth("mla", 1.84, 768)}

# Loads the page in frames of several widths, points at the arm "mla" in the first, and says what it saw.
WRAPPER = """<!DOCTYPE html><meta charset="utf-8"><body>%s<pre id="seen"></pre><script>
addEventListener('load', () => {
  const frames = [...document.querySelectorAll('iframe')].map(frame => frame.contentDocument);
  const seen = {widths: frames.map(page => [page.documentElement.scrollWidth, page.documentElement.clientWidth]),
                resources: frames.map(page => page.defaultView.performance.getEntriesByType('resource').length)};
  const page = frames[0];
  const count = query => page.querySelectorAll(query).length;
  const point = part => part.dispatchEvent(new page.defaultView.PointerEvent('pointerover', {bubbles: true}));
  const mark = [...page.querySelectorAll('#pareto [data-hover]')].find(g => g.dataset.hover.startsWith('mla:'));
  seen.before = count('.dim, .lit');
  point(mark);
  seen.tip = page.getElementById('tip').textContent;
  seen.lit = [...page.querySelectorAll('tr.lit')].map(row => row.cells[0].textContent);
  seen.dim = count('g.dim');
  seen.own = mark.classList.contains('dim');
  point(page.querySelector('h1'));
  seen.after = count('.dim, .lit');
  seen.tipHidden = page.getElementById('tip').hidden;
  const button = [...page.querySelectorAll('.legend button')].find(b => b.textContent === 'gqa');
  button.click();
  seen.pressed = button.getAttribute('aria-pressed');
  point(page.querySelector('h1'));
  seen.kept = count('g.dim');
  button.click();
  document.getElementById('seen').textContent = JSON.stringify(seen);
});
</script></body>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """report.html of a study with everything in it, failures and a long name."""
    folder = write_study(
        tmp_path_factory.mktemp("page") / "full",
        {**ARMS, **LONG},
        sweep=True,
        sweep_tokens=TOKENS,
        decode=True,
        staircase=["mha", "gqa", "mla_plain", "mla"],
        unfinished=[("mqa", 2)],
        failures=[{"run": "mqa-lr0.004-seed2", "error": "/a/path/without/a/single/space/" * 6}],
    )
    write_report(load_results(folder), folder)
    return folder / "report.html"


def test_the_page_takes_its_colours_from_the_palette() -> None:
    template = Path(page_of.__file__).with_name("page.html.j2").read_text(encoding="utf-8")
    palette = {*colours.COLOURS, colours.INK, colours.QUIET, colours.PAPER, colours.DARK_INK, colours.DARK_PAPER}
    assert palette & set(re.findall(r"#[0-9a-f]{6}", template)) == set()


def browse(page: Path, *arguments: str) -> tuple[str, str]:
    """What the browser wrote to stdout and to its log."""
    assert BROWSER is not None
    command = [
        BROWSER,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--enable-logging=stderr",
        f"--user-data-dir={page.parent / 'profile'}",
        "--no-first-run",
        "--disable-background-networking",
        *arguments,
        page.as_uri(),
    ]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0, shown.stderr
    return shown.stdout, shown.stderr


@pytest.fixture(scope="module")
def seen(page: Path) -> dict[str, Any]:
    frames = "".join(f'<iframe src="{page.name}" style="border: 0; width: {w}px; height: 900px"></iframe>' for w in WIDTHS)
    wrapper = page.with_name("wrapper.html")
    wrapper.write_text(WRAPPER % frames)
    output, log = browse(wrapper, "--dump-dom", "--allow-file-access-from-files", "--window-size=1400,900")
    found = re.search(r'<pre id="seen">(.*?)</pre>', output, flags=re.S)
    assert found is not None and found[1], log
    answer: dict[str, Any] = json.loads(html.unescape(found[1]))
    return answer | {"log": log}


@in_a_browser
def test_the_page_never_scrolls_sideways(seen: dict[str, Any]) -> None:
    assert seen["widths"] == [[width, width] for width in WIDTHS]


@in_a_browser
def test_the_page_loads_nothing_and_logs_no_error(seen: dict[str, Any]) -> None:
    assert seen["resources"] == [0, 0, 0]
    assert "CONSOLE" not in seen["log"], seen["log"]


@in_a_browser
def test_pointing_at_an_arm_names_it_with_its_figures_and_lights_it_up_in_figures_and_tables(seen: dict[str, Any]) -> None:
    assert (seen["before"], seen["after"]) == (0, 0)
    assert re.fullmatch(r"mla: 1\.8\d+ ± 0\.00\d+ bits per byte, 640 cache bytes per token, 3 seeds", seen["tip"])
    assert len(seen["lit"]) >= 5 and set(seen["lit"]) == {"mla"}
    assert seen["dim"] > 20 and seen["own"] is False
    assert seen["tipHidden"] is True


@in_a_browser
def test_an_arm_that_was_pressed_in_the_legend_stays_lit(seen: dict[str, Any]) -> None:
    assert seen["pressed"] == "true"
    assert seen["kept"] > 20


@in_a_browser
@pytest.mark.parametrize("width", WIDTHS[:2])
def test_the_page_is_drawn(page: Path, width: int) -> None:
    from matplotlib.image import imread

    picture = page.with_name(f"{width}.png")
    browse(page, f"--screenshot={picture}", f"--window-size={width},2400")
    pixels = imread(picture)[..., :3]
    assert pixels.shape[:2] == (2400, width)
    # Words and lines on white, in every part of it, and colours among them.
    inked = (pixels < 0.5).any(axis=2)
    assert 0.005 < inked.mean() < 0.5
    assert all(part.any() for part in (inked[:800], inked[800:1600], inked[1600:]))
    assert ((pixels.max(axis=2) - pixels.min(axis=2)) > 0.3).any()


@in_a_browser
@pytest.mark.parametrize(("scheme", "dark"), [(0, True), (1, False)])
def test_the_page_is_dark_where_the_reader_wants_that_with_its_pictures(page: Path, scheme: int, dark: bool) -> None:
    from matplotlib.image import imread

    picture = page.with_name(f"scheme{scheme}.png")
    browse(page, f"--screenshot={picture}", "--window-size=1280,2400", f"--blink-settings=preferredColorScheme={scheme}")
    light = imread(picture)[..., :3].mean(axis=2)
    paper = light < 0.15 if dark else light > 0.9
    assert paper.mean() > 0.7, "the page, its pictures and its tables are on one paper"
    drawn = (light > 0.6) if dark else (light < 0.45)
    assert drawn.mean() > 0.005 and all(part.any() for part in (drawn[:800], drawn[800:1600], drawn[1600:]))


def test_every_colour_has_a_light_and_a_dark_value(page: Path) -> None:
    text = page.read_text()
    light, dark = re.findall(r":root \{ (--c[^}]*)\}", text)
    used = set(re.findall(r"var\((--c[0-9a-f]{6})\)", text))
    assert set(re.findall(r"(--c\w+):", light)) == set(re.findall(r"(--c\w+):", dark)) >= used
    assert len(used) > 8
    for picture in re.findall(r"<svg.*?</svg>", text, flags=re.S):
        assert not re.search(r"(?:fill|stroke): *(?:#|rgb|black|white)", picture), "no colour stands in a picture itself"


def test_pictures_leave_the_rest_of_the_page_alone(page: Path) -> None:
    text = page.read_text()
    pictures = re.findall(r"<svg.*?</svg>", text, flags=re.S)
    ids = [name for picture in pictures for name in re.findall(r' id="([^"]*)"', picture)]
    assert len(ids) == len(set(ids)), "what one picture refers to lies in itself"
    for picture in pictures:
        referred = re.findall(r'(?:href="#|url\(#)([^")]*)', picture)
        assert set(referred) <= set(re.findall(r' id="([^"]*)"', picture))
        assert not re.search(r"<style|<metadata|font-family", picture)


def test_the_page_asks_nobody_for_anything(page: Path) -> None:
    text = page.read_text()
    assert not re.search(r"(?:src|href|srcset|action)\s*=\s*[\"']?\s*(?:https?:)?//", text)
    assert not re.search(r"url\((?!#)|@import|<link|<img|<iframe|fetch\(|XMLHttpRequest|import\(", text)
    assert "<script src" not in text


def test_without_javascript_figures_and_names_are_there(page: Path) -> None:
    text = re.sub(r"<script>.*?</script>", "", page.read_text(), flags=re.S)
    assert text.count('<svg class="wide"') == text.count('<svg class="narrow"') == 8
    assert re.search(r"<title>mla: 1\.8\d+ ± 0\.00\d+ bits per byte, 640 cache bytes", text)
    assert not re.search(r"<(?:section|figure|table)[^>]* hidden", text)


def test_every_figure_table_and_section_has_a_name_for_those_who_cannot_see_it(page: Path) -> None:
    text = page.read_text()
    assert all('aria-label="' in tag for tag in re.findall(r'<svg class="(?:wide|narrow)"[^>]*>', text))
    assert all('aria-label="' in tag for tag in re.findall(r'<div class="scroll"[^>]*>', text))
    named = re.findall(r'<section id="(\w+)" aria-labelledby="([\w-]+)">', text)
    assert len(named) == 12 and all(f'id="{label}"' in text for _, label in named)
    for row in re.findall(r"<tr.*?</tr>", text):
        assert re.search(r'<th scope="(?:row|col)"', row)
