"""The three outcomes against an attack's strength, as inline SVG that takes its colours and its type from the page."""

import re
from io import StringIO
from itertools import pairwise

import numpy as np
from markupsafe import Markup
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from numpy.lib.stride_tricks import sliding_window_view

from demur.evaluation.results import Curve, Series

# What matplotlib draws with, and what of the page's it stands for: so figures follow light, dark and print. The dotted
# and the striped fill are patterns that the template defines once; matplotlib's own hatching would be 100 kB a panel.
_FILLS = {"correct": "#000101", "rejected": "#000102", "wrong": "#000103"}
_MUTED, _PAPER = "#000104", "#000105"
_PAGE = {
    _FILLS["correct"]: "var(--correct)",
    _FILLS["rejected"]: "url(#dots)",
    _FILLS["wrong"]: "url(#stripes)",
    _MUTED: "var(--muted)",
    _PAPER: "var(--paper)",
}
_NAME_WIDTH, _NAME_HEIGHT = 23, 0.11
"""What a band's name takes up: so many hundredths of the width, and a share of the height."""


def panel(curve: Curve, series: Series, prefix: str) -> Markup:
    """Draw one series as stacked areas: correct at the bottom, then rejected, then wrong.

    `prefix` begins every id in the SVG, since many SVGs share a page. Text stays text; a stranger's is only in the
    escaped `aria-label`.
    """
    points = sorted(zip(curve.x, series.correct, series.rejected, series.wrong, strict=True))
    x = [point[0] for point in points]
    base = [0.0] * len(x)
    # From matplotlib's defaults, whatever the caller has set; the hash salt makes the same ids every time.
    with style.context(
        ["default", {"svg.fonttype": "none", "svg.hashsalt": prefix, "font.size": 9}]
    ):
        canvas = Canvas(figsize=(3.6, 2.3), layout="constrained")
        axes = canvas.subplots()
        for place, (outcome, fill) in enumerate(_FILLS.items(), start=1):
            top = [low + point[place] for low, point in zip(base, points, strict=True)]
            axes.fill_between(x, base, top, linewidth=0, facecolor=fill)
            if outcome != "wrong":
                axes.plot(
                    x, top, color=_PAPER, linewidth=1.0, marker="o", markersize=2.2, clip_on=False
                )
            _name(axes, outcome, x, base, top)
            base = top
        _frame(axes, x)
        text = StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        canvas.savefig(text, format="svg", transparent=True, metadata=nothing)
    return _inline(text.getvalue(), prefix, describe(curve, series))


def describe(curve: Curve, series: Series) -> str:
    """Say the key figures of a series in words: each outcome at both ends, and the worst share of wrong answers."""
    points = sorted(zip(curve.x, series.correct, series.rejected, series.wrong, strict=True))
    first, last, worst = points[0], points[-1], max(points, key=lambda point: point[3])
    spans = zip(_FILLS, first[1:], last[1:], strict=True)
    ends = ", ".join(f"{name} {100 * a:.1f} % to {100 * b:.1f} %" for name, a, b in spans)
    return (
        f"{series.name}: from {curve.x_label} {first[0]:g} to {last[0]:g}, {ends}; "
        f"wrong is highest, {100 * worst[3]:.1f} %, at {worst[0]:g}."
    )


def _name(axes: Axes, outcome: str, x: list[float], base: list[float], top: list[float]) -> None:
    """Write a band's name where the band holds it best, so that colour is never the only cue."""
    grid = np.linspace(x[0], x[-1], 101)
    floors, ceilings = (
        sliding_window_view(np.interp(grid, x, edge), _NAME_WIDTH) for edge in (base, top)
    )
    floor, ceiling = floors.max(axis=1), ceilings.min(axis=1)
    # Enough room is enough; beyond that the middle of the panel is the better place.
    off_centre = np.abs(np.arange(len(floor)) / (len(floor) - 1) - 0.5)
    best = int(np.argmax(np.minimum(ceiling - floor, 3 * _NAME_HEIGHT) - 0.1 * off_centre))
    if ceiling[best] - floor[best] >= _NAME_HEIGHT:
        middle = (floor[best] + ceiling[best]) / 2
        axes.text(
            grid[best + _NAME_WIDTH // 2],
            middle,
            outcome,
            ha="center",
            va="center",
            gid=f"name-{outcome}",
        )


def _frame(axes: Axes, x: list[float]) -> None:
    axes.set_ylim(0, 1)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100 %"])
    axes.set_xlim(x[0], x[-1])
    if min(right - left for left, right in pairwise(x)) * 8 >= x[-1] - x[0]:
        axes.set_xticks(x)
    axes.xaxis.set_major_formatter("{x:.3g}")
    axes.tick_params(colors=_MUTED, length=2.5, width=0.6, pad=2)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set(color=_MUTED, linewidth=0.6)


def _inline(svg: str, prefix: str, label: str) -> Markup:
    """Turn matplotlib's file into an element of the page: no header, no own style, no fixed size, ids of its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' font-family: [^;"]*;?', "", svg)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'(url\(|href=")#', rf"\g<1>#{prefix}-", svg)
    svg = re.sub("|".join(_PAGE), lambda found: _PAGE[found[0]], svg)
    svg = re.sub(
        r'<svg[^>]*viewBox="([^"]*)"[^>]*>',
        r'<svg viewBox="\1" role="img" aria-label="LABEL">',
        svg,
        count=1,
    )
    return Markup(svg.replace('"LABEL"', Markup('"{}"').format(label), 1))
