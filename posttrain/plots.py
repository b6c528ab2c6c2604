"""A line chart as an SVG file, written by hand: it needs no plotting library and opens in any browser."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

from .atomic import atomic_write

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 400, 64, 16, 40, 48
COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e")


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) from `low` to `high`."""
    span = (high - low) or abs(high) or 1.0
    power = 10 ** math.floor(math.log10(span / count))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= span / count)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of each value and up to `window` - 1 before it."""
    return [sum(part) / len(part) for i in range(len(values)) if (part := values[max(0, i - window + 1) : i + 1])]


def line_chart(
    path: str | os.PathLike,
    series: Mapping[str, Sequence[tuple[float, float]]],
    title: str = "",
    x_label: str = "",
    y_label: str = "",
) -> None:
    """Write `series` ({name: [(x, y), ...]}) as lines in one chart. ValueError without a finite point."""
    series = {name: [(x, y) for x, y in points if math.isfinite(x + y)] for name, points in series.items()}
    points = [point for line in series.values() for point in line]
    if not points:
        raise ValueError("nothing to draw: no series has a finite point")
    (x0, x1), (y0, y1) = ((min(axis), max(axis)) for axis in zip(*points, strict=True))
    x1, y0, y1 = x1 + (x1 == x0), y0 - 0.05 * (y1 - y0) - (y1 == y0), y1 + 0.05 * (y1 - y0) + (y1 == y0)

    def at(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)
        return across, HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)

    def text(x: float, y: float, content: str, anchor: str = "middle", more: str = "") -> str:
        return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>{escape(content)}</text>'

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        text(WIDTH / 2, 22, title, more='font-size="15"'),
        text(WIDTH / 2, HEIGHT - 8, x_label),
        text(14, HEIGHT / 2, y_label, more=f'transform="rotate(-90 14 {HEIGHT / 2})"'),
    ]
    for y in ticks(y0, y1):
        _, v = at(x0, y)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{v:.1f}" y2="{v:.1f}" stroke="#ddd"/>')
        parts.append(text(LEFT - 6, v + 4, f"{y:.6g}", "end"))
    for x in ticks(x0, x1, 8):
        u, _ = at(x, y0)
        parts.append(text(u, HEIGHT - BOTTOM + 18, f"{x:.6g}"))
    parts.append(
        f'<polyline points="{LEFT},{TOP} {LEFT},{HEIGHT - BOTTOM} {WIDTH - RIGHT},{HEIGHT - BOTTOM}" fill="none" stroke="#444"/>'
    )
    for i, (name, line) in enumerate(series.items()):
        color = COLORS[i % len(COLORS)]
        way = " ".join("{:.1f},{:.1f}".format(*at(x, y)) for x, y in line)
        parts.append(f'<polyline points="{way}" fill="none" stroke="{color}" stroke-width="1.8"/>')
        if len(series) > 1:
            parts.append(text(WIDTH - RIGHT - 4, TOP + 14 + 16 * i, name, "end", f'fill="{color}"'))
    with atomic_write(path) as temporary:
        temporary.write_text("\n".join([*parts, "</svg>"]) + "\n", encoding="utf-8")
