"""Line charts and histograms: what stands where, for the SVG of `templates/pieces.html.jinja`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from markupsafe import Markup

from minibert.reporting.format import compact
from minibert.reporting.render import pieces

MOST_POINTS, MOST_DOTS = 240, 40  # of a curve


@dataclass(frozen=True)
class Series:
    """One curve (or cloud of dots) of a chart; `tone` numbers the page's colours, 0 is grey."""

    name: str
    x: np.ndarray  # [n]
    y: np.ndarray  # [n]
    tone: int = 1
    curve: bool = True
    dots: bool = False
    dashed: bool = False
    sizes: np.ndarray | None = None  # [n] fraction that the area of each dot shows


def keys(series: Sequence[Series]) -> list[tuple[str, int]]:
    """The legend of a figure: each curve's name and tone."""
    return [(s.name, s.tone) for s in series]


@dataclass(frozen=True)
class Bars:
    """A histogram: counts between edges; edges of integers count the integers from one up to, not with, the next."""

    edges: np.ndarray  # [n + 1]
    counts: np.ndarray  # [n]


@dataclass
class Drawing:
    """A chart in the units of its box, which are those of its text: readable on a phone as it is."""

    label: str
    x_name: str
    y_name: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    bars: list[tuple[float, float, float, float, str]] = field(default_factory=list)  # x, y, width, height, title
    curves: list[Curve] = field(default_factory=list)
    marks: list[tuple[float, float, str]] = field(default_factory=list)  # x, top, text
    width: int = 360
    height: int = 230
    margin_left: int = 64  # of tick labels, and left of them the name of the axis
    margin_right: int = 10
    margin_top: int = 12
    margin_bottom: int = 36


@dataclass(frozen=True)
class Curve:
    tone: int
    dashed: bool
    line: str  # the points of its polyline; "" for dots alone
    dots: list[tuple[float, float, float, str]]  # x, y, radius, title


Place = Callable[[Any, Any], tuple[np.ndarray, np.ndarray]]


def chart(
    series: Sequence[Series],
    x_name: str,
    y_name: str,
    *,
    bars: Bars | None = None,
    marks: Sequence[tuple[float, str]] = (),
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
) -> Markup:
    """Curves or a histogram with axes; `marks` are vertical lines with a text."""
    series = [drawable(s) for s in series]
    xs = [s.x for s in series] + ([bars.edges] if bars else []) + [np.array([x for x, _ in marks])]
    ys = [s.y for s in series] + ([np.append(bars.counts, [0, 1])] if bars else [])
    x_low, x_high = x_range or limits_of(xs)
    y_low, y_high = y_range or rounded(limits_of(ys))
    names = ", ".join(s.name for s in series) or y_name
    d = Drawing(f"{names} by {x_name}", x_name, y_name, [], [])

    def place(x: Any, y: Any) -> tuple[np.ndarray, np.ndarray]:
        across = (np.asarray(x, dtype=np.float64) - x_low) / (x_high - x_low)
        up = (np.asarray(y, dtype=np.float64) - y_low) / (y_high - y_low)
        left = d.margin_left + across * (d.width - d.margin_left - d.margin_right)
        top = d.height - d.margin_bottom - up * (d.height - d.margin_top - d.margin_bottom)
        return left.round(1), top.round(1)

    d.x_ticks = [(float(place(x, y_low)[0]), compact(x)) for x in ticks(x_low, x_high)]
    d.y_ticks = [(float(place(x_low, y)[1]), compact(y)) for y in ticks(y_low, y_high)]
    d.bars = _bars(place, bars) if bars else []
    d.curves = [_curve(place, s) for s in series]
    d.marks = [(float(place(x, 0)[0]), float(place(x, y_high)[1]), text) for x, text in marks]
    return pieces.chart(d)


def _curve(place: Place, s: Series) -> Curve:
    x, y = place(s.x, s.y)
    line = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True)) if s.curve and len(x) > 1 else ""
    dots = []
    if s.dots or len(x) == 1:
        radii = np.full(len(x), 3.0 if s.curve else 2.5) if s.sizes is None else 2 + 5 * np.sqrt(s.sizes)
        titles = [f"{s.name}: {b:.4g} at {a:.4g}" if s.curve else "" for a, b in zip(s.x, s.y, strict=True)]
        dots = list(zip(x.tolist(), y.tolist(), radii.round(1).tolist(), titles, strict=True))
    return Curve(s.tone, s.dashed, line, dots)


def _bars(place: Place, bars: Bars) -> list[tuple[float, float, float, float, str]]:
    left, bottom = place(bars.edges[:-1], 0)
    right, top = place(bars.edges[1:], bars.counts)
    drawn = []
    for i, count in enumerate(bars.counts):
        low, high = bars.edges[i], bars.edges[i + 1]
        last = high - 1 if np.issubdtype(bars.edges.dtype, np.integer) else high
        title = f"{low:.4g}: {count:g}" if low == last else f"{low:.4g} to {last:.4g}: {count:g}"
        width = max(float(right[i] - left[i]) - 1, 0.8)
        drawn.append((float(left[i]) + 0.5, float(top[i]), round(width, 1), round(float(bottom - top[i]), 1), title))
    return drawn


def drawable(series: Series) -> Series:
    """The points that can be drawn, at most MOST_POINTS of a curve."""
    x, y = np.asarray(series.x, dtype=np.float64), np.asarray(series.y, dtype=np.float64)
    good = np.isfinite(x) & np.isfinite(y)
    sizes = None if series.sizes is None else series.sizes[good]
    x, y = x[good], y[good]
    if sizes is None and len(x) > MOST_POINTS and series.curve:
        keep = evenly_along(x, y, MOST_POINTS)
        x, y = x[keep], y[keep]
    dots = series.dots and not (series.curve and sizes is None and len(x) > MOST_DOTS)
    return Series(series.name, x, y, series.tone, series.curve, dots, series.dashed, sizes)


def evenly_along(x: np.ndarray, y: np.ndarray, count: int) -> np.ndarray:
    """Indices of about `count` points, evenly far from each other along the curve, ends included."""
    steps = np.hypot(np.diff(x) / (np.ptp(x) or 1), np.diff(y) / (np.ptp(y) or 1))
    way = np.concatenate([[0], np.cumsum(steps)])
    chosen = np.searchsorted(way, np.linspace(0, way[-1], count))
    return np.unique(np.concatenate([[0], chosen.clip(0, len(x) - 1), [len(x) - 1]]))


def limits_of(values: Sequence[np.ndarray]) -> tuple[float, float]:
    """Lowest and highest of several arrays, never equal nor apart by mere rounding."""
    joined = np.concatenate([np.asarray(v, dtype=np.float64) for v in values]) if values else np.zeros(0)
    joined = joined[np.isfinite(joined)]
    low, high = (float(joined.min()), float(joined.max())) if len(joined) else (0.0, 1.0)
    if high - low > 1e-9 * max(abs(low), abs(high)):
        return low, high
    return low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2


def rounded(limits: tuple[float, float]) -> tuple[float, float]:
    """Limits widened to whole ticks; from 0 where that is near."""
    low, high = limits
    low = 0.0 if 0 <= low < 0.5 * high else low
    for _ in range(2):  # wider limits may need a wider step
        step = tick_step(low, high)
        low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    return low, high


def tick_step(low: float, high: float, count: int = 5) -> float:
    """1, 2 or 5 times a power of ten, for about `count` ticks."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)


def ticks(low: float, high: float) -> list[float]:
    step = tick_step(low, high)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]
