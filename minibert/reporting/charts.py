"""Small pieces of a page: line charts and histograms as inline SVG, bars and tables as HTML.

Whatever is not `Html` already is escaped, so text from data cannot become markup.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minibert.runtime.files import valid_unicode

WIDTH, HEIGHT = 360, 230  # of a chart, in the units of its text: readable on a phone as it is
LEFT, RIGHT, TOP, BOTTOM = 54, 10, 12, 36
MOST_POINTS, MOST_DOTS = 240, 40  # of a curve
INVISIBLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Html(str):
    """Markup, as opposed to text."""


def esc(value: Any) -> Html:
    """Text -> markup that shows it as it is; `Html` stays."""
    if isinstance(value, Html):
        return value
    text = valid_unicode(str(value)).replace("\r\n", "\n").replace("\r", "\n")
    return Html(html.escape(INVISIBLE.sub("\ufffd", text)))


def join(pieces: Iterable[str]) -> Html:
    return Html("".join(esc(piece) for piece in pieces))


def section(title: str, pieces: Sequence[Html], grid: bool = True) -> Html:
    """A headline and its pieces; nothing where there are none."""
    if not pieces:
        return Html("")
    body = join(pieces)
    body = Html(f'<div class="grid">{body}</div>') if grid else body
    return Html(f"<section><h2>{esc(title)}</h2>{body}</section>\n")


def soft(text: str) -> Html:
    """A sentence that stands back."""
    return Html(f'<p class="soft">{esc(text)}</p>')


def fixed(value: float | None, digits: int = 3) -> str:
    """A metric with so many decimals; a dash where it is undefined."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


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
    sizes: np.ndarray | None = None  # [n] share of each dot, which its area shows


def keys(series: Sequence[Series]) -> list[tuple[str, int]]:
    """The legend of a figure: each curve's name and tone."""
    return [(s.name, s.tone) for s in series]


@dataclass(frozen=True)
class Bars:
    """A histogram: counts between edges."""

    edges: np.ndarray  # [n + 1]
    counts: np.ndarray  # [n]
    tone: int = 1


def chart(
    series: Sequence[Series],
    x_name: str,
    y_name: str,
    *,
    bars: Bars | None = None,
    marks: Sequence[tuple[float, str]] = (),
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
) -> Html:
    """Curves or a histogram with axes; `marks` are vertical lines with a text."""
    series = [finite(s) for s in series]
    xs = [s.x for s in series] + ([bars.edges] if bars else []) + [np.array([x for x, _ in marks])]
    ys = [s.y for s in series] + ([np.append(bars.counts, [0, 1])] if bars else [])
    x_low, x_high = x_range or spread(xs)
    y_low, y_high = y_range or rounded(spread(ys))

    def place(x: Any, y: Any) -> tuple[Any, Any]:
        across = (np.asarray(x, dtype=np.float64) - x_low) / (x_high - x_low)
        up = (np.asarray(y, dtype=np.float64) - y_low) / (y_high - y_low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [_axes(place, (x_low, x_high), (y_low, y_high), x_name, y_name)]
    if bars:
        parts.append(_bars(place, bars))
    parts += [_curve(place, s) for s in series]
    parts += [_mark(place, x, text, y_low, y_high) for x, text in marks]
    names = ", ".join(s.name for s in series) or y_name
    label = esc(f"{names} by {x_name}")
    return Html(f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{join(parts)}</svg>')


def finite(series: Series) -> Series:
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


def spread(values: Sequence[np.ndarray]) -> tuple[float, float]:
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


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    step = tick_step(low, high, count)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def short(value: float) -> str:
    """A number for an axis: 1.5k, 0.05, 5e-5."""
    if abs(value) >= 1e10:
        return f"{value:.3g}".replace("e+", "e")
    if abs(value) >= 1e6:
        return f"{value / 1e6:.4g}M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:.4g}k"
    if value and abs(value) < 1e-3:
        mantissa, _, exponent = f"{value:.3g}".partition("e")
        return f"{mantissa}e{int(exponent)}" if exponent else mantissa
    return f"{value:.4g}"


def _axes(place: Any, x_limits: tuple[float, float], y_limits: tuple[float, float], x_name: str, y_name: str) -> Html:
    parts = []
    for value in ticks(*y_limits):
        _, y = place(x_limits[0], value)
        parts.append(f'<line class="grid-line" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{short(value)}</text>')
    bottom = HEIGHT - BOTTOM
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    for value in ticks(*x_limits):
        x, _ = place(value, y_limits[0])
        parts.append(f'<text x="{x:.1f}" y="{bottom + 15}" text-anchor="middle">{short(value)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{esc(x_name)}</text>')
    centre = (TOP + bottom) / 2
    parts.append(f'<text transform="translate(10 {centre}) rotate(-90)" text-anchor="middle">{esc(y_name)}</text>')
    return Html("".join(parts))


def _curve(place: Any, s: Series) -> Html:
    x, y = place(s.x, s.y)
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    parts = []
    if s.curve and len(x) > 1:
        parts.append(f'<polyline class="curve{" dashed" if s.dashed else ""}" points="{points}"/>')
    if s.dots or len(x) == 1:
        radii = np.full(len(x), 3.0 if s.curve else 2.5) if s.sizes is None else 2 + 5 * np.sqrt(s.sizes)
        style = "dot" if s.curve else "dot faint"
        for a, b, radius, real_x, real_y in zip(x, y, radii, s.x, s.y, strict=True):
            title = f"<title>{esc(s.name)}: {real_y:.4g} at {real_x:.4g}</title>" if s.curve else ""
            parts.append(f'<circle class="{style}" cx="{a:.1f}" cy="{b:.1f}" r="{radius:.1f}">{title}</circle>')
    return Html(f'<g class="t{s.tone}">{"".join(parts)}</g>')


def _bars(place: Any, bars: Bars) -> Html:
    left, bottom = place(bars.edges[:-1], 0)
    right, top = place(bars.edges[1:], bars.counts)
    parts = []
    for i, count in enumerate(bars.counts):
        width = max(right[i] - left[i] - 1, 0.8)
        title = f"<title>{bars.edges[i]:.4g} to {bars.edges[i + 1]:.4g}: {count:g}</title>"
        box = f'x="{left[i] + 0.5:.1f}" y="{top[i]:.1f}" width="{width:.1f}" height="{bottom - top[i]:.1f}"'
        parts.append(f'<rect class="bar" {box}>{title}</rect>')
    return Html(f'<g class="t{bars.tone}">{"".join(parts)}</g>')


def _mark(place: Any, x: float, text: str, y_low: float, y_high: float) -> Html:
    across, bottom = place(x, y_low)
    _, top = place(x, y_high)
    anchor, gap = ("end", -5) if across > WIDTH / 2 else ("start", 5)
    line = f'<line class="mark" x1="{across:.1f}" x2="{across:.1f}" y1="{top:.1f}" y2="{bottom:.1f}"/>'
    words = (
        f'<text class="mark-text" x="{across + gap:.1f}" y="{top + 9:.1f}" text-anchor="{anchor}">{esc(text)}</text>'
    )
    return Html(line + words)


def figure(
    title: str, body: Html, *, legend: Sequence[tuple[str, int]] = (), note: str = "", wide: bool = False
) -> Html:
    keys = join(Html(f'<span class="t{tone}"><i></i>{esc(name)}</span>') for name, tone in legend)
    legend_box = f'<div class="legend">{keys}</div>' if legend else ""
    note_box = f'<p class="note">{esc(note)}</p>' if note else ""
    kind = ' class="wide"' if wide else ""
    return Html(f"<figure{kind}><figcaption>{esc(title)}</figcaption>{legend_box}{body}{note_box}</figure>")


def tile(name: str, value: str, more: str = "") -> Html:
    rest = f'<div class="more">{esc(more)}</div>' if more else ""
    return Html(
        f'<div class="tile"><div class="name">{esc(name)}</div><div class="value">{esc(value)}</div>{rest}</div>'
    )


def bar_list(rows: Sequence[tuple[str, float, str]]) -> Html:
    """Horizontal bars of (name, value, what to write behind it)."""
    highest = max((value for _, value, _ in rows), default=0) or 1
    parts = [
        f'<span class="key" title="{esc(name)}"><bdi>{esc(name)}</bdi></span><span class="track">'
        f'<i style="width:{100 * value / highest:.1f}%"></i></span>'
        f'<span class="number">{esc(text)}</span>'
        for name, value, text in rows
    ]
    return Html(f'<div class="bars">{"".join(parts)}</div>')


def stacked(parts: Sequence[tuple[str, float]]) -> Html:
    """One bar of several shares."""
    tones = [f'<i class="t{(i + 1) % 4}" style="flex:{value:.4f}"></i>' for i, (_, value) in enumerate(parts)]
    return Html(f'<div class="stack">{"".join(tones)}</div>')


def table(header: Sequence[str], kinds: str, rows: Iterable[Sequence[Any]]) -> Html:
    """`kinds` has a letter for each column: n number, t text, l label."""
    names = {"n": "number", "t": "text", "l": "name"}
    head = "".join(f'<th class="{names[k]}">{esc(name)}</th>' for name, k in zip(header, kinds, strict=True))
    lines = []
    for row in rows:
        cells = []
        for value, kind, column in zip(row, kinds, header, strict=True):
            content = esc(value) if kind == "n" else f"<bdi>{esc(value)}</bdi>"
            cells.append(f'<td class="{names[kind]}" data-name="{esc(column)}">{content}</td>')
        lines.append(f"<tr>{''.join(cells)}</tr>")
    body = "".join(lines)
    style = ' class="texts"' if kinds.startswith("t") else ""  # on a phone, texts stand above their other cells
    return Html(
        f'<div class="panel scroll"><table{style}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def meter(value: float) -> Html:
    """A number from 0 to 1 with a small bar."""
    return Html(f'{value:.3f}<span class="meter"><i style="width:{100 * min(max(value, 0), 1):.0f}%"></i></span>')


def heat_map(names: Sequence[str], counts: np.ndarray) -> Html:
    """A confusion matrix [n, n]: counts, coloured by their share of the row."""
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    many = len(names) > 6
    head = "".join(
        f'<th class="column" title="{esc(cut(name, 80))}"><bdi>{esc(cut(name, 18 if many else 28))}</bdi></th>'
        for name in names
    )
    lines = []
    for name, row, share in zip(names, counts, shares, strict=True):
        cells = "".join(
            f'<td{" class=hot" if s > 0.55 else ""} style="--share:{s:.3f}">{c if c else "·"}</td>'
            for c, s in zip(row.tolist(), share.tolist(), strict=True)
        )
        lines.append(f'<tr><th class="row"><bdi>{esc(cut(name, 40))}</bdi></th>{cells}</tr>')
    kind = "heat many" if many else "heat"
    return Html(f'<div class="scroll"><table class="{kind}"><tr><th></th>{head}</tr>{"".join(lines)}</table></div>')


def cut(text: str, length: int) -> str:
    """Long text shortened for a table."""
    text = str(text)
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"
