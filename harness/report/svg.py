"""A picture as an element of the page: matplotlib's SVG with the page's colours and fonts, and what can be pointed at."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from harness.files.text import visible
from harness.report.canvas import Drawing, conventions, line_style, marker_look
from harness.report.colours import Style
from harness.report.pictures import Picture
from harness.report.plots import draw

if TYPE_CHECKING:
    from markupsafe import Markup


def as_svg(picture: Picture, width: float, numbers: Mapping[str, int], *, columns: int, kind: str, label: str) -> Markup:
    """A picture as an element of the page: what belongs to arms has their numbers, colours are the page's variables.

    kind: its class. label: for those who cannot see it.
    """
    drawing = draw(picture, width, columns=columns)
    return _element(drawing, numbers, {"class": kind, "role": "img", "aria-label": visible(label)}, f"{picture.name} {kind}")


def legend_sample(style: Style, number: int) -> Markup:
    """An arm's line and marker, for the page's legend."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    with conventions():
        figure = Figure(figsize=(30 / 72, 14 / 72), dpi=72)
        line: dict[str, Any] = {"linestyle": line_style(style), "linewidth": 1.8}
        for x, look in (([1, 29], line), ([15], marker_look(style, size=9))):
            figure.add_artist(Line2D(x, [7] * len(x), color=style.colour, transform=Drawing(figure).points, **look))
    return _element(Drawing(figure), {}, {"width": "30", "height": "14", "aria-hidden": "true"}, f"sample {number}")


def colour_variable(colour: str) -> str:
    """The name of a colour on the page, whose style sheet says it for a light and for a dark one."""
    return f"--c{colour[1:].lower()}"


def _element(drawing: Drawing, numbers: Mapping[str, int], attributes: dict[str, str], salt: str) -> Markup:
    """matplotlib's SVG without what a page has or must not have: a style sheet, fonts, colours, ids that nobody uses."""
    from markupsafe import Markup
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    text = io.StringIO()
    drawing.figure.set_facecolor("none")
    with conventions(**{"svg.hashsalt": salt}):
        FigureCanvasSVG(drawing.figure).print_svg(text, metadata={"Date": None})
    root = ElementTree.fromstring(text.getvalue())
    for child in list(root):
        if child.tag.endswith("}metadata") or child.find("{*}style") is not None:
            root.remove(child)
    root.attrib = attributes | {"viewBox": root.attrib["viewBox"]}
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {name.rpartition("}")[2]: _tidied(name, value) for name, value in element.items()}
        element.tail = None
        if element.tag in ("svg", "g", "defs"):
            element.text = None
            arms, hovers = drawing.parts.get(element.attrib.pop("id", ""), ((), ()))
            _mark(element, " ".join(str(numbers[arm]) for arm in arms if arm in numbers), hovers)
        elif element.attrib.get("transform", "").startswith("rotate(-0 "):
            del element.attrib["transform"]
    _simplify(root)
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _simplify(element: ElementTree.Element) -> None:
    """What markers have in common is said once, and groups that say nothing go."""
    kept: list[ElementTree.Element] = []
    for child in element:
        _simplify(child)
        if child.tag == "g" and not child.attrib:
            kept += child
        elif child.attrib.get("style") != "fill: none":
            kept.append(child)
    element[:] = kept
    looks = {child.get("style") for child in element if child.tag == "use"}
    if len(looks) == 1 and element.tag == "g":
        element.set("style", looks.pop() or "")
        for child in element.findall("use"):
            del child.attrib["style"]


def _tidied(name: str, value: str) -> str:
    if name == "style":
        value = re.sub(r"font-family: [^;]*; ?", "", value)
        return re.sub(r"#[0-9a-f]{6}\b", lambda colour: f"var({colour_variable(colour[0])})", value)
    if name in ("d", "x", "y", "transform", "width", "height"):
        shorter = re.sub(r"-?\d+\.\d+", lambda number: f"{float(number[0]):.1f}".removesuffix(".0"), value)
        return " ".join(shorter.split())
    return value


def _mark(element: ElementTree.Element, arms: str, hovers: Sequence[str]) -> None:
    """Whose a group is, and the words of those who point at it, or at each of its markers."""
    if not arms:
        return
    element.set("data-arm", arms)
    markers = element.findall(".//{*}use")
    single = len(hovers) == 1 or len(hovers) != len(markers)
    for target, hover in zip([element] if single else markers, hovers, strict=False):
        if hover:
            title = ElementTree.Element("title")
            title.text = visible(hover)
            target.insert(0, title)
