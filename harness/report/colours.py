"""The one palette, how an arm looks in every picture, and what a colour becomes on a dark page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

INK, QUIET, RULE, GRID, PALE, PAPER = "#1a1a1a", "#595959", "#8c8c8c", "#e6e6e6", "#bdbdbd", "#ffffff"
DARK_INK, DARK_PAPER = "#e8e8e8", "#16181c"

# Okabe and Ito's palette without its yellow, which vanishes on white. Shapes and dashes tell apart what shares a colour,
# and everything in grayscale.
FAMILY_COLOURS = {"mha": "#0072b2", "gqa": "#d55e00", "mqa": "#cc79a7", "mla": "#009e73"}
OTHER_COLOURS = ("#e69f00", "#56b4e9", "#000000", "#7f7f7f")
COLOURS = (*FAMILY_COLOURS.values(), *OTHER_COLOURS)
WORSE, BETTER = FAMILY_COLOURS["gqa"], FAMILY_COLOURS["mha"]
MARKERS = ("o", "s", "^", "D", "v", "p", "<", ">", "*")  # matplotlib's
DASHES: tuple[tuple[float, ...], ...] = ((), (6, 3), (2, 2.5), (8, 2.5, 2, 2.5), (12, 4))  # points on, points off


@dataclass(frozen=True)
class Style:
    """How an arm is drawn in every picture."""

    colour: str
    marker: str = "o"
    dash: tuple[float, ...] = ()


def styles(families: Mapping[str, str]) -> dict[str, Style]:
    """Of the arms, from arm -> family: a family has one colour; where there is one family alone, the arms have."""
    names = list(dict.fromkeys(families.values()))
    if len(names) == 1:
        return _styles_of_one_family(list(families))
    others = [name for name in names if name not in FAMILY_COLOURS]
    several = (*OTHER_COLOURS, *FAMILY_COLOURS.values())
    colours = FAMILY_COLOURS | {name: several[i % len(several)] for i, name in enumerate(others)}
    found: dict[str, Style] = {}
    seen: dict[str, int] = {}
    for arm, family in families.items():
        number = seen[family] = seen.get(family, -1) + 1
        found[arm] = Style(colours[family], MARKERS[number % len(MARKERS)], DASHES[number % len(DASHES)])
    return found


def _styles_of_one_family(arms: Sequence[str]) -> dict[str, Style]:
    """An arm that is called like a family has that one's colour, as in other pictures; the others share the rest."""
    rest = [colour for colour in COLOURS if colour not in {FAMILY_COLOURS.get(arm) for arm in arms}]
    others = [arm for arm in arms if arm not in FAMILY_COLOURS]
    found = {}
    for number, arm in enumerate(arms):
        turn, place = divmod(others.index(arm), len(rest)) if arm in others else (0, 0)
        colour = FAMILY_COLOURS.get(arm, rest[place])
        found[arm] = Style(colour, MARKERS[number % len(MARKERS)], DASHES[turn % len(DASHES)])
    return found


def darker(colour: str) -> str:
    """Small letters need more contrast than markers."""
    return mixed(colour, "#000000", 0.4)


def in_the_dark(colour: str) -> str:
    """What a colour of a picture becomes on a dark page: the same hue, light where it was dark, with as much contrast.

    Greys turn round between PAPER and INK; colours are mixed with white until they stand out from DARK_PAPER as small
    letters must (a ratio of 4.5, WCAG 2.2, 1.4.3).
    """
    red, green, blue = _parts(colour)
    if red == green == blue:
        ink = _parts(INK)[0]
        return mixed(DARK_INK, DARK_PAPER, min(1.0, max(0.0, (red - ink) / (255 - ink))))
    lighter = (mixed(colour, "#ffffff", step / 20) for step in range(21))
    return next(tried for tried in lighter if contrast(tried, DARK_PAPER) >= 4.5)


def contrast(a: str, b: str) -> float:
    """The ratio of two colours' relative luminances, from 1 to 21 (WCAG 2.2)."""
    levels = []
    for colour in (a, b):
        shares = [part / 255 for part in _parts(colour)]
        linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
        levels.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(levels) + 0.05) / (min(levels) + 0.05)


def mixed(a: str, b: str, share: float) -> str:
    """From a to b."""
    return "#" + "".join(f"{round(x + (y - x) * share):02x}" for x, y in zip(_parts(a), _parts(b), strict=True))


def _parts(colour: str) -> tuple[int, int, int]:
    red, green, blue = bytes.fromhex(colour[1:])
    return red, green, blue
