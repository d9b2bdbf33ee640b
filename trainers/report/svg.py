"""Plots as inline SVG: few kilobytes each, sharp at any size, told apart without colour.

Colours are those of Okabe and Ito ("Color Universal Design", 2008) but for the yellow, which is too light on white;
each series has a marker and, where colours come again, a line of its own.
"""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

__all__ = ["Dot", "Line", "bar", "interval", "legend", "line_plot", "scatter"]

_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES = ("", "6 3", "2 2", "8 3 2 3")
_INK, _GRID = "#444", "#e4e4e4"
_LETTER = 0.56  # width of a letter, in font sizes
_FONT = 12
_LOGARITHMIC = 30  # largest by smallest value, above which an axis is so


class Dot(NamedTuple):
    """A point of a scatter plot; the style goes by its number."""

    name: str
    style: int
    x: float
    y: float
    x_error: float = 0.0
    y_low: float | None = None
    y_high: float | None = None


class Line(NamedTuple):
    """A curve: x, y, lowest and highest value there; the style goes by its number."""

    name: str
    style: int
    points: Sequence[tuple[float, float, float, float]]


def _color(style: int) -> str:
    return _COLORS[style % len(_COLORS)]


def _marker(style: int, x: float, y: float, size: float = 4.5) -> str:
    color, a = _color(style), size
    shapes = (
        f"M{x - a:.1f} {y:.1f}a{a} {a} 0 1 0 {2 * a} 0a{a} {a} 0 1 0 {-2 * a} 0z",
        f"M{x - a:.1f} {y - a:.1f}h{2 * a}v{2 * a}h{-2 * a}z",
        f"M{x - a:.1f} {y + a:.1f}l{a} {-2 * a}l{a} {2 * a}z",
        f"M{x:.1f} {y - a - 1:.1f}l{a + 1} {a + 1}l{-a - 1} {a + 1}l{-a - 1} {-a - 1}z",
        f"M{x - a:.1f} {y - a:.1f}l{a} {2 * a}l{a} {-2 * a}z",
        f"M{x - a:.1f} {y - a:.1f}l{2 * a} {2 * a}m0 {-2 * a}l{-2 * a} {2 * a}",
        f"M{x - a:.1f} {y:.1f}h{2 * a}m{-a} {-a}v{2 * a}",
        f"M{x - a:.1f} {y - a / 2:.1f}h{2 * a}v{a}h{-2 * a}z",
    )
    number = style % len(shapes)
    paint = f'fill="none" stroke="{color}" stroke-width="2.2"' if number in (5, 6) else f'fill="{color}" stroke="#fff"'
    return f'<path d="{shapes[number]}" {paint}/>'


def _ticks(low: float, high: float, most: int = 5) -> list[float]:
    raw = (high - low) / most or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * part for part in (1, 2, 2.5, 5, 10) if power * part >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, first + most + 2) if number * step <= high + 1e-9 * step]


def _number(value: float) -> str:
    text = f"{value:.6g}"
    return text.replace("-", "\u2212") if "e" not in text else f"{value:.0e}"


class _Axes:
    """A frame of data in a picture: scales, ticks and names of the axes."""

    def __init__(
        self, xs: Sequence[float], ys: Sequence[float], width: int, height: int, labels: tuple[str, str], pad: float
    ) -> None:
        self.width, self.height = width, height
        self._log = min(ys) > 0 and max(ys) > _LOGARITHMIC * min(ys)
        self.x0, self.x1 = _widened(min(xs), max(xs), pad)
        low, high = (math.log10(y) if self._log else y for y in (min(ys), max(ys)))
        self.y0, self.y1 = _widened(low, high, max(pad, 0.04))
        x_ticks, y_ticks = _ticks(self.x0, self.x1, width // 75), _ticks(self.y0, self.y1, height // 45)
        if self._log:
            powers = range(math.floor(self.y0), math.ceil(self.y1) + 1)
            steps = [part * 10.0**power for power in powers for part in ((1, 3) if len(powers) < 5 else (1,))]
            y_ticks = [step for step in steps if self.y0 <= math.log10(step) <= self.y1]
        self.left = 16 + max(len(_number(tick)) for tick in y_ticks) * _FONT * _LETTER + (16 if labels[1] else 0)
        self.right, self.top, self.bottom = width - 14, 8, height - (38 if labels[0] else 22)
        parts = []
        for tick in y_ticks:
            y = self.y(tick)
            parts.append(f'<path d="M{self.left:.0f} {y:.1f}H{self.right}" stroke="{_GRID}"/>')
            parts.append(f'<text x="{self.left - 5:.0f}" y="{y + 4:.1f}" text-anchor="end">{_number(tick)}</text>')
        for tick in x_ticks:
            x = self.x(tick)
            parts.append(f'<path d="M{x:.1f} {self.bottom}v4" stroke="{_INK}"/>')
            parts.append(f'<text x="{x:.1f}" y="{self.bottom + 17}" text-anchor="middle">{_number(tick)}</text>')
        parts.append(f'<path d="M{self.left:.0f} {self.top}V{self.bottom}H{self.right}" stroke="{_INK}" fill="none"/>')
        middle_x, middle_y = (self.left + self.right) / 2, (self.top + self.bottom) / 2
        if labels[0]:
            parts.append(f'<text x="{middle_x:.0f}" y="{height - 5}" text-anchor="middle">{escape(labels[0])}</text>')
        if labels[1]:
            turned = f'transform="rotate(-90 12 {middle_y:.0f})" text-anchor="middle"'
            parts.append(f'<text x="12" y="{middle_y:.0f}" {turned}>{escape(labels[1])}</text>')
        self.parts = parts

    def x(self, value: float) -> float:
        return self.left + (value - self.x0) / (self.x1 - self.x0) * (self.right - self.left)

    def y(self, value: float) -> float:
        value = math.log10(value) if self._log else value
        return self.bottom - (value - self.y0) / (self.y1 - self.y0) * (self.bottom - self.top)

    def close(self, title: str) -> str:
        return _svg(self.width, self.height, title, "".join(self.parts))


def _widened(low: float, high: float, pad: float) -> tuple[float, float]:
    margin = pad * (high - low) if high > low else abs(low) / 10 or 1.0
    return low - margin, high + margin


def _svg(width: int, height: int, title: str, inner: str, kind: str = "plot") -> str:
    return (
        f'<svg class="{kind}" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{escape(title)}">{inner}</svg>'
    )


def scatter(dots: Sequence[Dot], labels: tuple[str, str], title: str, *, named: bool, size: tuple[int, int]) -> str:
    """A scatter plot with error bars.

    Args:
        dots: the points, at least one.
        labels: names of both axes.
        title: for those who do not see it.
        named: whether each point's name is written beside it.
        size: width and height, in pixels.
    """
    xs = [dot.x + side * dot.x_error for dot in dots for side in (-1, 1)]
    ys = [value for dot in dots for value in (dot.y, dot.y_low, dot.y_high) if value is not None]
    axes = _Axes(xs, ys, *size, labels, 0.07)
    taken = [(axes.x(dot.x) - 6, axes.y(dot.y) - 6, axes.x(dot.x) + 6, axes.y(dot.y) + 6) for dot in dots]
    for dot in dots:
        x, y, bars = axes.x(dot.x), axes.y(dot.y), ""
        if dot.x_error:
            left, right = axes.x(dot.x - dot.x_error), axes.x(dot.x + dot.x_error)
            bars += f"M{left:.1f} {y:.1f}H{right:.1f}"
            taken.append((left, y - 2, right, y + 2))
        if dot.y_low is not None and dot.y_high is not None:
            bottom, top = axes.y(dot.y_low), axes.y(dot.y_high)
            bars += f"M{x:.1f} {bottom:.1f}V{top:.1f}"
            taken.append((x - 2, top, x + 2, bottom))
        if bars:
            axes.parts.append(f'<path d="{bars}" stroke="{_color(dot.style)}" stroke-opacity=".55" fill="none"/>')
    for dot in dots:
        mark = _marker(dot.style, axes.x(dot.x), axes.y(dot.y), 5)
        axes.parts.append(f"<g>{mark}<title>{escape(dot.name)}</title></g>")
    for dot in dots if named else ():
        axes.parts.append(_label(axes, dot, taken))
    return axes.close(title)


def _label(axes: _Axes, dot: Dot, taken: list[tuple[float, float, float, float]]) -> str:
    """A name where it covers least of points and other names, beside its point."""
    x, y, width = axes.x(dot.x), axes.y(dot.y), len(dot.name) * _FONT * _LETTER
    places = []
    for up in (-11, 11, 0, -25, 25):
        places += [(x + 8, y + up + 4), (x - 8 - width, y + up + 4), (x - width / 2, y + 1.3 * up + 4)]
    boxes = [(left, base - 10, left + width, base + 3) for left, base in places]

    def cost(box: tuple[float, float, float, float]) -> float:
        covered = sum(
            max(min(box[2], other[2]) - max(box[0], other[0]), 0)
            * max(min(box[3], other[3]) - max(box[1], other[1]), 0)
            for other in taken
        )
        outside = max(axes.left - box[0], 0) + max(box[2] - axes.width, 0) + max(box[3] - axes.bottom, 0)
        return covered + 50 * outside + 50 * max(-box[1], 0)

    best = min(range(len(boxes)), key=lambda index: (cost(boxes[index]), index))
    taken.append(boxes[best])
    left, base = places[best]
    return f'<text x="{left:.1f}" y="{base:.1f}" class="name">{escape(dot.name)}</text>'


def line_plot(lines: Sequence[Line], title: str, x_label: str = "", size: tuple[int, int] = (340, 210)) -> str:
    """Curves, with a band from the lowest to the highest value where these differ.

    Args:
        lines: the curves, each of at least one point.
        title: for those who do not see it.
        x_label: name of the axis to the right.
        size: width and height, in pixels.
    """
    xs = [point[0] for line in lines for point in line.points]
    ys = [value for line in lines for point in line.points for value in point[1:]]
    axes = _Axes(xs, ys, *size, (x_label, ""), 0.02)
    for line in lines:
        if len(line.points) > 1 and any(high > low for _, _, low, high in line.points):
            edge = [(x, high) for x, _, _, high in line.points] + [(x, low) for x, _, low, _ in reversed(line.points)]
            path = " ".join(f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in edge)
            axes.parts.append(f'<polygon points="{path}" fill="{_color(line.style)}" fill-opacity=".13"/>')
    for line in lines:
        path = " ".join(f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y, _, _ in line.points)
        dash = _DASHES[line.style // len(_COLORS) % len(_DASHES)]
        look = f'stroke="{_color(line.style)}" stroke-dasharray="{dash}" stroke-width="1.8" fill="none"'
        x, y = line.points[-1][:2]
        mark = _marker(line.style, axes.x(x), axes.y(y), 4)
        name = f"<title>{escape(line.name)}</title>"
        axes.parts.append(f'<g><polyline points="{path}" {look}/>{mark}{name}</g>')
    return axes.close(title)


def legend(names: Sequence[tuple[str, int]]) -> str:
    """Markers and names of series."""
    keys = []
    for name, style in names:
        dash = _DASHES[style // len(_COLORS) % len(_DASHES)]
        line = f'<path d="M0 7H24" stroke="{_color(style)}" stroke-width="2" stroke-dasharray="{dash}"/>'
        keys.append(f"<span>{_svg(24, 14, '', line + _marker(style, 12, 7, 4), 'key')} {escape(name)}</span>")
    return f'<p class="legend">{"".join(keys)}</p>'


def interval(value: float, low: float | None, high: float | None, scale: tuple[float, float]) -> str:
    """A value and its interval on a scale that rows of a table have in common."""
    width, height = 150, 16
    start, end = _widened(*scale, 0.03)

    def place(number: float) -> float:
        return (number - start) / (end - start) * width

    line = f'<path d="M0 {height / 2}H{width}" stroke="{_GRID}"/>'
    if low is not None and high is not None:
        ends = f"M{place(low):.1f} 5v6M{place(high):.1f} 5v6"
        line += f'<path d="M{place(low):.1f} 8H{place(high):.1f}{ends}" stroke="#555"/>'
    dot = f'<circle cx="{place(value):.1f}" cy="8" r="4" fill="{_COLORS[0]}"/>'
    return _svg(width, height, f"{value:.4g}", line + dot, "cell")


def bar(shares: Sequence[tuple[float, str]], width: int = 220) -> str:
    """Shares of 1 beside each other, each with a fill; what is missing of 1 stays empty."""
    parts, left = [], 0.0
    for share, fill in shares:
        parts.append(f'<rect x="{left * width:.1f}" y="2" width="{share * width:.1f}" height="12" fill="{fill}"/>')
        left += share
    return _svg(width, 16, ", ".join(f"{100 * share:.1f} %" for share, _ in shares), "".join(parts), "cell")
