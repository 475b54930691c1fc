"""The report as one HTML file: opens from disk, asks no network for anything, and can be read without JavaScript.

Every figure is there twice, laid out for a wide and for a narrow page; the style sheet shows one. Pointing at something
that belongs to an arm lights that arm up in all figures and tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from harness.study.drawing import Area, Circle, Drawing, Figure, Group, Line, Panel, Shape, Spot, Style, draw, marker
from harness.study.findings import Findings
from harness.study.sections import Section, Table, arm_styles, sections

# CSS pixels: one, two or three panels side by side on a desk, and each by itself on a phone.
WIDE, NARROW = {1: 1020.0, 2: 500.0, 3: 326.0}, 326.0


def page(findings: Findings) -> str:
    """The whole document."""
    results = findings.results
    numbers = {arm.name: str(i) for i, arm in enumerate(findings.arms)}
    found = sections(findings)
    links = "".join(f'<li><a href="#{section.key}">{escape(section.title)}</a></li>' for section in found)
    body = "".join(_section(section, numbers) for section in found)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(results.name)}: {escape(results.question)}</title>
<style>{_STYLE}</style>
</head>
<body>
<header>
<p class="kind">Study <strong>{escape(results.name)}</strong></p>
<h1>{escape(results.question)}</h1>
{_problems(findings)}
<nav aria-label="Sections"><ul>{links}</ul></nav>
</header>
{_legend(arm_styles(findings), numbers)}
<main>
{body}
</main>
<p id="tip" role="status" hidden></p>
<script>{_SCRIPT}</script>
</body>
</html>
"""


def _problems(findings: Findings) -> str:
    """Failures and missing runs, where nobody overlooks them."""
    failures = [f"<strong>{escape(f['run'])} failed:</strong> {escape(f['error'])}" for f in findings.results.failures]
    lines = [*failures, *(escape(note[:1].upper() + note[1:]) + "." for note in findings.notes)]
    if not lines:
        return ""
    items = "".join(f"<li>{line}</li>" for line in lines)
    return f'<aside class="problems" aria-label="To know first"><h2>To know first</h2><ul>{items}</ul></aside>'


def _legend(found: dict[str, Style], numbers: dict[str, str]) -> str:
    """Every arm with its colour and shape; pressed, it stays lit."""
    buttons = []
    for arm, style in found.items():
        sample = Drawing(30, 14)
        sample.add(Line([(1, 7), (29, 7)], style.colour, 1.8, style.dash), marker(15, 7, style, size=4.5))
        buttons.append(
            f'<li><button type="button" data-arm="{numbers[arm]}" aria-pressed="false">'
            f'<svg width="30" height="14" aria-hidden="true">{"".join(map(_shape, sample.groups[0].shapes))}</svg>'
            f"{escape(arm)}</button></li>"
        )
    return f'<ul class="legend" aria-label="Arms: press one to keep it lit">{"".join(buttons)}</ul>'


# --- sections --------------------------------------------------------------------------------------------------------


def _section(section: Section, numbers: dict[str, str]) -> str:
    parts = [f'<section id="{section.key}" aria-labelledby="{section.key}-title">',
             f'<h2 id="{section.key}-title">{escape(section.title)}</h2>']  # fmt: skip
    parts += [f"<p>{escape(text)}</p>" for text in section.words]
    if section.points:
        parts.append(
            '<ul class="verdicts">' + "".join(f"<li>{escape(point)}</li>" for point in section.points) + "</ul>"
        )
    parts += [_figure(figure, numbers) for figure in section.figures]
    parts += [_table(table, numbers) for table in section.tables]
    if section.code:
        parts.append(
            f'<div class="scroll" role="region" tabindex="0" aria-label="Command"><pre>{escape(section.code)}</pre></div>'
        )
    parts += [f"<p>{escape(text)}</p>" for text in section.after]
    if section.more:
        parts.append("<ul>" + "".join(f"<li>{escape(point)}</li>" for point in section.more) + "</ul>")
    return "\n".join([*parts, "</section>"])


def _table(table: Table, numbers: dict[str, str]) -> str:
    def cell(tag: str, text: str, column: int, scope: str = "") -> str:
        kind = ' class="words"' if column in table.words else ""
        return f"<{tag}{scope}{kind}>{escape(text)}</{tag}>"

    head = "".join(cell("th", text, i, ' scope="col"') for i, text in enumerate(table.columns))
    rows = []
    for line in table.lines:
        arm = f' data-arm="{numbers[line.arm]}"' if line.arm in numbers else ""
        marked = ' class="marked"' if line.marked else ""
        cells = [
            cell("th" if i == 0 else "td", text, i, ' scope="row"' if i == 0 else "")
            for i, text in enumerate(line.cells)
        ]
        rows.append(f"<tr{arm}{marked}>{''.join(cells)}</tr>")
    title = f"<h3>{escape(table.title)}</h3>" if table.title else ""
    label = escape(table.title or table.columns[0], quote=True)
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    return (
        f'{title}<div class="scroll" role="region" tabindex="0" aria-label="Table: {label}"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>{note}"
    )


def _figure(figure: Figure, numbers: dict[str, str]) -> str:
    panels = []
    for heading, panel in figure.panels:
        title = f"<h4>{escape(heading)}</h4>" if heading else ""
        label = f"{figure.title}{': ' if heading else ''}{heading}"
        wide = WIDE[min(3, len(figure.panels))]
        panels.append(
            f'<div class="panel">{title}{_svg(panel, wide, "wide", label, numbers)}'
            f"{_svg(panel, NARROW, 'narrow', label, numbers)}</div>"
        )
    kind = f"panels of{min(3, len(panels))}"
    return (
        f'<figure id="figure-{figure.name}"><h3>{escape(figure.title)}</h3><div class="{kind}">{"".join(panels)}</div>'
        f"<figcaption>{escape(figure.caption)}</figcaption></figure>"
    )


# --- SVG -------------------------------------------------------------------------------------------------------------


def _svg(panel: Panel, width: float, kind: str, label: str, numbers: dict[str, str]) -> str:
    drawing = draw(panel, width)
    groups = "".join(_group(group, numbers) for group in drawing.groups)
    return (
        f'<svg class="{kind}" viewBox="0 0 {_n(drawing.width)} {_n(drawing.height)}" role="img" '
        f'aria-label="{escape(label, quote=True)}">{groups}</svg>'
    )


def _group(group: Group, numbers: dict[str, str]) -> str:
    arms = " ".join(numbers[arm] for arm in group.arms if arm in numbers)
    attribute = f' data-arm="{arms}"' if arms else ""
    title = f"<title>{escape(group.hover)}</title>" if group.hover else ""
    return f"<g{attribute}>{title}{''.join(map(_shape, group.shapes))}</g>"


def _shape(shape: Shape) -> str:
    if isinstance(shape, Line):
        dash = f' stroke-dasharray="{",".join(map(_n, shape.dash))}"' if shape.dash else ""
        stroke = f'stroke="{shape.colour}" stroke-width="{_n(shape.width)}"{dash}'
        return f'<polyline points="{_points(shape.points)}" fill="none" {stroke}/>'
    if isinstance(shape, Area):
        edge = f' stroke="{shape.edge}" stroke-width="0.8"' if shape.edge else ""
        opacity = f' fill-opacity="{_n(shape.opacity)}"' if shape.opacity < 1 else ""
        return f'<polygon points="{_points(shape.points)}" fill="{shape.fill}"{edge}{opacity}/>'
    if isinstance(shape, Circle):
        return (f'<circle cx="{_n(shape.x)}" cy="{_n(shape.y)}" r="{_n(shape.radius)}" fill="{shape.fill}" '
                f'stroke="{shape.edge}" stroke-width="0.8"/>')  # fmt: skip
    if isinstance(shape, Spot):
        return f'<circle cx="{_n(shape.x)}" cy="{_n(shape.y)}" r="{_n(shape.radius)}" fill="transparent"/>'
    anchor = f' text-anchor="{shape.anchor}"' if shape.anchor != "start" else ""
    bold = ' font-weight="bold"' if shape.bold else ""
    halo = ' class="halo"' if shape.halo else ""
    return (f'<text x="{_n(shape.x)}" y="{_n(shape.y + 0.36 * shape.size)}" font-size="{_n(shape.size)}" '
            f'fill="{shape.colour}"{anchor}{bold}{halo}>{escape(shape.text)}</text>')  # fmt: skip


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{_n(x)},{_n(y)}" for x, y in points)


def _n(number: float) -> str:
    return f"{number:.1f}".removesuffix(".0")


_STYLE = """
:root { color-scheme: light; --ink: #1a1a1a; --quiet: #595959; --rule: #d9d9d9; --lit: #fff4d6; }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; scroll-padding-top: 4rem; }
body { margin: 0 auto; padding: 1.2rem 1rem 4rem; max-width: 78rem; color: var(--ink); background: #fff;
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; overflow-wrap: anywhere; }
.kind { margin: 0; color: var(--quiet); }
h1 { margin: 0.2rem 0 1rem; font-size: 1.6rem; line-height: 1.25; }
h2 { margin: 2.4rem 0 0.6rem; padding-top: 0.6rem; border-top: 1px solid var(--rule); font-size: 1.25rem; }
h3 { margin: 1.2rem 0 0.5rem; font-size: 1rem; }
h4 { margin: 0 0 0.4rem; font-size: 0.875rem; font-weight: 600; }
nav ul, .legend { display: flex; flex-wrap: wrap; gap: 0.3rem 1rem; margin: 0; padding: 0; list-style: none;
  font-size: 0.9rem; }
a { color: #005a8f; }
.problems { margin: 1rem 0; padding: 0.6rem 1rem; border: 1px solid #D55E00; border-left-width: 6px; background: #fff7f2; }
.problems h2 { margin: 0; padding: 0; border: 0; font-size: 1rem; }
.problems ul { margin: 0.3rem 0 0; padding-left: 1.2rem; }
.legend { position: sticky; top: 0; z-index: 2; gap: 0.2rem; margin: 1.2rem 0 0; padding: 0.4rem 0; background: #fffffff2;
  border-bottom: 1px solid var(--rule); }
.legend button { display: flex; align-items: center; gap: 0.35rem; padding: 0.2rem 0.5rem; border: 1px solid transparent;
  border-radius: 4px; background: none; color: inherit; font: inherit; font-size: 0.85rem; cursor: pointer; }
.legend button:hover, .legend button[aria-pressed="true"] { border-color: var(--quiet); background: var(--lit); }
main section > p, figcaption, .note, .verdicts { max-width: 54rem; }
main section:first-child h2 { border-top: 0; margin-top: 0.6rem; }
.verdicts { margin: 0.6rem 0; padding-left: 1.2rem; font-size: 1.05rem; }
.verdicts li { margin: 0.3rem 0; }
figure { margin: 1rem 0 1.6rem; }
figcaption, .note { color: var(--quiet); font-size: 0.875rem; }
figcaption { margin-top: 0.5rem; }
.note { margin: 0.4rem 0 1.4rem; }
.of2, .of3 { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 1.2rem; }
.of3 { grid-template-columns: repeat(3, minmax(0, 1fr)); }
svg.wide, svg.narrow { display: block; width: 100%; height: auto; overflow: visible; }
svg.narrow { display: none; }
svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
.halo { paint-order: stroke; stroke: #fff; stroke-width: 3px; stroke-linejoin: round; }
/* A shadow at each edge behind which a table goes on. */
.scroll { max-width: 100%; overflow-x: auto; margin: 0.4rem 0 0; background:
  linear-gradient(to right, #fff 40%, #fff0) 0 0 / 2.5rem 100% no-repeat local,
  linear-gradient(to left, #fff 40%, #fff0) 100% 0 / 2.5rem 100% no-repeat local,
  linear-gradient(to right, #0003, #0000) 0 0 / 0.7rem 100% no-repeat scroll,
  linear-gradient(to left, #0003, #0000) 100% 0 / 0.7rem 100% no-repeat scroll; }
.scroll:focus-visible, button:focus-visible, a:focus-visible { outline: 2px solid #005a8f; outline-offset: 2px; }
table { border-collapse: collapse; font-size: 0.875rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: 0.3rem 0.6rem; border-bottom: 1px solid var(--rule); text-align: right; white-space: nowrap; }
thead th { border-bottom: 2px solid var(--quiet); vertical-align: bottom; white-space: normal; min-width: 5.4rem; }
tbody th { position: sticky; left: 0; background: #fff; font-weight: 600; }
th.words, td.words { text-align: left; }
tr.marked > * { background: #fff7f2; }
tr.lit > * { background: var(--lit); }
pre { margin: 0; padding: 0.6rem 0.8rem; background: #f5f5f5; font-size: 0.85rem; }
.dim { opacity: 0.15; }
g[data-arm], .legend button { transition: opacity 0.1s; }
#tip { position: fixed; z-index: 3; margin: 0; padding: 0.3rem 0.6rem; max-width: min(22rem, 90vw); border-radius: 4px;
  background: var(--ink); color: #fff; font-size: 0.85rem; line-height: 1.35; pointer-events: none; }
@media (max-width: 60rem) {
  svg.wide { display: none; }
  svg.narrow { display: block; max-width: 30rem; }
  .of2, .of3 { grid-template-columns: minmax(0, 1fr); }
  h1 { font-size: 1.35rem; }
  .legend { position: static; }
  tbody th { white-space: normal; min-width: 6rem; }
}
@media (prefers-reduced-motion: reduce) { g[data-arm], .legend button { transition: none; } }
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  nav, #tip { display: none; }
  .legend { position: static; }
  svg.wide { display: block; }
  svg.narrow { display: none; }
  .of2 { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .of3 { grid-template-columns: repeat(3, minmax(0, 1fr)); }
  .scroll { overflow: visible; }
  th, td { white-space: normal; padding: 0.15rem 0.3rem; }
  table { font-size: 7.5pt; }
  tbody th { position: static; }
  figure, tr, .verdicts li { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  * { -webkit-print-color-adjust: exact; print-color-adjust: exact; }
}
"""

_SCRIPT = """
(() => {
  const tip = document.getElementById('tip');
  const parts = [...document.querySelectorAll('[data-arm]')];
  const armsOf = part => part.dataset.arm.split(' ');
  let kept = null;
  for (const title of document.querySelectorAll('svg title')) {
    title.parentNode.dataset.hover = title.textContent;
    title.remove();
  }
  const light = arms => {
    for (const part of parts) {
      const own = arms !== null && armsOf(part).some(arm => arms.includes(arm));
      if (part.tagName === 'TR') part.classList.toggle('lit', own);
      else if (part.tagName === 'g') part.classList.toggle('dim', arms !== null && !own);
    }
  };
  const place = event => {
    const box = tip.getBoundingClientRect();
    const x = Math.min(event.clientX + 14, innerWidth - box.width - 6);
    const y = event.clientY + 18 + box.height > innerHeight ? event.clientY - box.height - 12 : event.clientY + 18;
    tip.style.left = Math.max(6, x) + 'px';
    tip.style.top = Math.max(6, y) + 'px';
  };
  document.addEventListener('pointerover', event => {
    const part = event.target.closest('[data-arm]');
    light(part ? armsOf(part) : kept);
    const words = part ? part.dataset.hover : '';
    tip.hidden = !words;
    tip.textContent = words || '';
    if (words) place(event);
  });
  document.addEventListener('pointermove', event => { if (!tip.hidden) place(event); });
  document.addEventListener('pointerleave', () => { tip.hidden = true; light(kept); });
  for (const button of document.querySelectorAll('.legend button')) {
    button.addEventListener('click', () => {
      const arms = armsOf(button);
      kept = kept !== null && kept[0] === arms[0] ? null : arms;
      for (const other of document.querySelectorAll('.legend button'))
        other.setAttribute('aria-pressed', String(kept !== null && other.dataset.arm === kept[0]));
      light(kept);
    });
    button.addEventListener('focus', () => light(armsOf(button)));
    button.addEventListener('blur', () => light(kept));
  }
})();
"""
