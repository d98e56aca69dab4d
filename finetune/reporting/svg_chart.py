"""Curves as SVG, for pages that load nothing from elsewhere: no scripts, no fonts, colours by the page's style."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 220
LEFT, RIGHT, TOP, BOTTOM = 72, 12, 12, 28
MOST_POINTS = 400  # of one curve; of more, means of as many in a row are shown


@dataclass(frozen=True, slots=True)
class Curve:
    """points: (x, y), x ascending; those with a y that is no number are left out. style: line, faint (a thin line), dots, or
    limit (a horizontal line through the first point)."""

    name: str
    points: Sequence[tuple[float, float | None]]
    style: str = "line"


def chart(curves: Sequence[Curve], show: Callable[[float], str] = "{:.4g}".format, unit: str = "step") -> str:
    """An <svg> element; empty where there is nothing to be shown. show: a y as its axis has it. unit: of x."""
    curves = [Curve(one.name, _thinned(_finite(one.points)), one.style) for one in curves]
    curves = [one for one in curves if one.points]
    drawn = [point for one in curves for point in one.points]
    if not any(one.style != "limit" for one in curves):
        return ""
    xs, ys = [x for x, _ in drawn], [y for _, y in drawn]
    least_x, most_x = min(xs), max(max(xs), min(xs) + 1)
    ticks = _ticks(min(ys), max(ys))
    least_y, most_y = min(ticks[0], min(ys)), max(ticks[-1], max(ys))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - least_x) / (most_x - least_x) * (WIDTH - LEFT - RIGHT)
        up = (y - least_y) / (most_y - least_y) * (HEIGHT - TOP - BOTTOM)
        return round(LEFT + across, 1), round(HEIGHT - BOTTOM - up, 1)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(", ".join(one.name for one in curves))}">']
    for tick in ticks:
        _, y = place(least_x, tick)
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{y}" x2="{WIDTH - RIGHT}" y2="{y}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{escape(show(tick))}</text>')
    for tick in _ticks(least_x, most_x):
        if least_x <= tick <= most_x and tick == int(tick):
            x, _ = place(tick, least_y)
            parts.append(f'<text class="tick" x="{x}" y="{HEIGHT - 8}" text-anchor="middle">{int(tick)}</text>')
    parts.append(f'<text class="tick" x="4" y="{HEIGHT - 8}">{escape(unit)}</text>')
    for number, one in enumerate(curves):
        parts.append(_drawn(one, number, place, (LEFT, WIDTH - RIGHT), show))
    return "".join([*parts, "</svg>"]) + _legend(curves)


def shares(parts: Sequence[tuple[str, float]], show: Callable[[float], str]) -> str:
    """A bar of parts of a whole, with a legend that says each part's size and share."""
    total = sum(size for _, size in parts)
    if total <= 0:
        return ""
    bars, start = [], 0.0
    for number, (name, size) in enumerate(parts):
        width = size / total * WIDTH
        place = f'x="{start:.1f}" y="0" width="{width:.1f}" height="24"'
        bars.append(f'<rect class="fill{number}" {place}><title>{escape(name)}</title></rect>')
        start += width
    words = " ".join(
        f'<span class="key key{number}">{escape(f"{name}: {show(size)} ({size / total:.0%})")}</span>'
        for number, (name, size) in enumerate(parts)
    )
    return f'<svg viewBox="0 0 {WIDTH} 24" role="img">{"".join(bars)}</svg><p class="legend">{words}</p>'


def _drawn(
    one: Curve, number: int, place: Callable[[float, float], tuple[float, float]], across: tuple[int, int],
    show: Callable[[float], str],
) -> str:  # fmt: skip
    places = [place(*point) for point in one.points]
    if one.style == "limit":
        (_, y), (left, right) = places[0], across
        return f'<line class="curve{number} limit" x1="{left}" y1="{y}" x2="{right}" y2="{y}"/>'
    drawn = ""
    if len(places) > 1:
        path = " ".join(f"{x},{y}" for x, y in places)
        drawn = f'<polyline class="curve{number}{" faint" if one.style == "faint" else ""}" points="{path}"/>'
    if one.style == "dots" or len(places) == 1:
        drawn += "".join(
            f'<circle class="fill{number}" cx="{x}" cy="{y}" r="3.5"><title>{escape(f"{at:g}: {show(value)}")}</title></circle>'
            for (x, y), (at, value) in zip(places, one.points, strict=True)
        )
    return drawn


def _legend(curves: Sequence[Curve]) -> str:
    words = " ".join(f'<span class="key key{number}">{escape(one.name)}</span>' for number, one in enumerate(curves))
    return f'<p class="legend">{words}</p>'


def _finite(points: Sequence[tuple[float, float | None]]) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if isinstance(y, int | float) and math.isfinite(y)]


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    size = -(-len(points) // MOST_POINTS)
    if size <= 1:
        return list(points)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def _ticks(least: float, most: float) -> list[float]:
    """Round numbers, from the last one below to the first one above."""
    span = most - least or abs(most) or 1.0
    step = 10 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (factor * step) <= 5)
    first, last = math.floor(least / step + 1e-9), math.ceil(most / step - 1e-9)
    return [number * step for number in range(first, max(last, first + 1) + 1)]
