"""Charts as inline SVG, coloured by the page's stylesheet; every text passes through `Markup` and is escaped."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

WIDTH, HEIGHT = 520, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 16, 26, 46
CHARACTER = 6.4  # width of a character of the 12-pixel labels, near enough to keep labels apart


@dataclass(frozen=True)
class Axis:
    """A scale from values to 0…1 with its ticks, `[(value, text)]`."""

    label: str
    lo: float
    hi: float
    ticks: list[tuple[float, str]]
    log: bool = False

    def __call__(self, value: float) -> float:
        if self.log:
            return math.log(value / self.lo) / math.log(self.hi / self.lo)
        return (value - self.lo) / (self.hi - self.lo)


def _text(value: float, step: float, top: float) -> str:
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if top >= 1e5 and abs(value) >= size and abs(float(f"{value / size:.4g}") * size - value) < step / 10:
            return f"{value / size:.4g}{suffix}"
    return f"{value:,.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def axis(values: Sequence[float], label: str, log: bool = False) -> Axis:
    """The axis that shows all `values` (finite; positive when `log`) with ticks at 1, 2 or 5 times a power of ten."""
    lo, hi = min(values), max(values)
    if log:
        lo, hi = lo / 1.6, hi * 1.6
        steps = (1, 2, 5) if hi / lo < 1e3 else (1,)
        decades = range(math.floor(math.log10(lo)), math.ceil(math.log10(hi)) + 1)
        ticks = [step * 10.0**decade for decade in decades for step in steps]
        return Axis(label, lo, hi, [(t, _text(t, t, hi)) for t in ticks if lo <= t <= hi], log)
    if hi - lo <= 1e-9 * abs(hi):
        pad = abs(hi) / 10 or 1.0
        lo, hi = lo - pad, hi + pad
    scale = 0
    if max(abs(lo), abs(hi)) < 0.01:
        scale = math.floor(math.log10(max(abs(lo), abs(hi))))
        label = f"{label} (×10{str(scale).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))})"
    rough = (hi - lo) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= rough * (1 - 1e-9))
    if all(isinstance(value, int) for value in values):
        step = max(step, 1)
    first, last = math.floor(lo / step + 1e-6), math.ceil(hi / step - 1e-6)
    unit = 10.0**scale
    ticks = [(i * step, _text(i * step / unit, step / unit, hi)) for i in range(first, last + 1)]
    return Axis(label, first * step, last * step, ticks)


def _place(x: Axis, y: Axis):
    """From values to pixels."""
    return (
        lambda value: LEFT + x(value) * (WIDTH - LEFT - RIGHT),
        lambda value: HEIGHT - BOTTOM - y(value) * (HEIGHT - TOP - BOTTOM),
    )


def _frame(x: Axis, y: Axis, body: list[Markup], described_by: str, reference: tuple[float, str] | None) -> Markup:
    px, py = _place(x, y)
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = [Markup('<svg viewBox="0 0 {} {}" role="img" aria-labelledby="{}">').format(WIDTH, HEIGHT, described_by)]
    for value, text in y.ticks:
        at = f"{py(value):.1f}"
        parts.append(Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(LEFT, right, at, at))
        parts.append(Markup('<text x="{}" y="{}" dy="4" text-anchor="end">{}</text>').format(LEFT - 8, at, text))
    parts.append(Markup('<line class="axis" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(LEFT, right, bottom, bottom))
    for value, text in x.ticks:
        at = f"{px(value):.1f}"
        parts.append(Markup('<line class="axis" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(at, at, bottom, bottom + 4))
        parts.append(Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>').format(at, bottom + 18, text))
    parts.append(Markup('<text class="label" x="{}" y="{}" text-anchor="end">{}</text>').format(right, HEIGHT - 8, x.label))
    parts.append(Markup('<text class="label" x="0" y="12">{}</text>').format(y.label))
    if reference:
        at = py(reference[0])
        parts.append(Markup('<line class="reference" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(LEFT, right, at, at))
        parts.append(Markup('<text class="label" x="{}" y="{:.1f}" text-anchor="end">{}</text>').format(right, at - 6, reference[1]))
    return Markup("").join([*parts, *body, Markup("</svg>")])


def thin(items: Sequence, most: int) -> list:
    """At most `most` of the items, evenly spaced, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


@dataclass(frozen=True)
class Series:
    """`points` are finite (x, y) in order of x; `style`: "line", "faint" (a thin grey line), "dots" or "ring"."""

    name: str
    points: list[tuple[float, float]]
    style: str = "line"


def _legend(names: list[tuple[str, str]]) -> list[Markup]:
    """Names with a swatch, set from the right edge of the top margin."""
    parts, x = [], WIDTH - RIGHT
    for style, name in reversed(names):
        x -= 1.15 * CHARACTER * len(name)  # letters are larger on a small screen
        parts.append(Markup('<text class="label" x="{:.1f}" y="12">{}</text>').format(x, name))
        x -= 22
        if style in ("line", "faint"):
            swatch = Markup('<line class="{}" x1="{:.1f}" x2="{:.1f}" y1="8" y2="8"/>').format(style, x, x + 16)
        else:
            swatch = Markup('<circle class="{}" cx="{:.1f}" cy="8" r="4"/>').format(style, x + 10)
        parts.append(swatch)
        x -= 14
    return parts


def lines(series: list[Series], x_label: str, y_label: str, described_by: str, reference: tuple[float, str] | None = None) -> Markup:
    """Series over a shared x axis; `reference` is a named horizontal line; `described_by` the id of the caption."""
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for _, y in s.points] + ([reference[0]] if reference else [])
    x, y = axis(xs, x_label), axis(ys, y_label)
    # A line chart fills its width: steps start at the first log, not at the tick before it.
    x = Axis(x.label, min(xs), max(xs), [t for t in x.ticks if min(xs) <= t[0] <= max(xs)]) if max(xs) > min(xs) else x
    px, py = _place(x, y)
    body = _legend([(s.style, s.name) for s in series]) if len(series) > 1 else []
    for s in series:
        points = thin(s.points, 500)
        if s.style in ("line", "faint"):
            path = " ".join(f"{px(a):.1f},{py(b):.1f}" for a, b in points)
            body.append(Markup('<polyline class="{}" points="{}"/>').format(s.style, path))
            points = points if len(points) <= 30 and s.style == "line" else []
        body += [
            Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="{}"/>').format(s.style, px(a), py(b), 7 if s.style == "ring" else 3.5) for a, b in points
        ]
    values = [(s.name, dict(s.points)) for s in series if s.style != "ring"]
    stops = thin(series[0].points, 120)
    for i, (a, b) in enumerate(stops):
        left = LEFT if i == 0 else (px(stops[i - 1][0]) + px(a)) / 2
        right = WIDTH - RIGHT if i == len(stops) - 1 else (px(a) + px(stops[i + 1][0])) / 2
        said = ", ".join(f"{name} {known[a]:.4g}" for name, known in values if a in known)
        body.append(
            Markup(
                '<g class="hit"><rect x="{:.1f}" y="{}" width="{:.1f}" height="{}"><title>{} {:,g}: {}</title></rect>'
                '<circle cx="{:.1f}" cy="{:.1f}" r="4"/></g>'
            ).format(left, TOP, right - left, HEIGHT - TOP - BOTTOM, x_label, a, said, px(a), py(b))
        )
    return _frame(x, y, body, described_by, reference)


@dataclass(frozen=True)
class Point:
    x: float
    y: float
    label: str
    href: str | None = None
    spread: float = 0.0
    labelled: bool = True  # or else the label is in the hover title alone


def _free_place(px: float, py: float, width: float, taken: list[tuple[float, float, float, float]], others: list[tuple[float, float]]):
    """Where a label beside a point hides nothing and is nearer to it than to `others`: (x, y, anchor) and its box, or None."""
    for x, y, anchor in (
        (px + 9, py + 4, "start"), (px - 9, py + 4, "end"), (px - 5, py - 9, "end"), (px + 7, py + 17, "start"),
        (px, py - 11, "middle"), (px, py + 20, "middle"), (px + 7, py - 9, "start"), (px - 7, py + 17, "end"),
        (px - 6, py + 19, "start"), (px + 9, py + 30, "start"), (px - 9, py + 30, "end"), (px + 9, py + 44, "start"),
    ):  # fmt: skip
        left = x - {"start": 0, "middle": width / 2, "end": width}[anchor]
        box = (left, y - 11, left + width, y + 3)
        inside = box[0] >= LEFT and box[2] <= WIDTH and box[1] >= TOP - 8 and box[3] <= HEIGHT - BOTTOM
        clear = not any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken)
        if inside and clear and _away(box, px, py) <= min((_away(box, *other) for other in others), default=math.inf):
            return (x, y, anchor), box
    return None


def _away(box: tuple[float, float, float, float], px: float, py: float) -> float:
    return math.hypot(max(box[0] - px, 0, px - box[2]), max(box[1] - py, 0, py - box[3]))


def scatter(
    points: list[Point],
    front: list[int],
    x_label: str,
    y_label: str,
    described_by: str,
    log_x: bool = False,
    reference: tuple[float, str] | None = None,
) -> Markup:
    """Named points; those of `front` (indices, smaller x first) are filled and joined by a staircase.

    A label that finds no free place is left to the point's hover title. `spread` is drawn as y ± spread.
    """
    ys = [p.y + sign * p.spread for p in points for sign in (-1, 1)] + ([reference[0]] if reference else [])
    xs = [p.x for p in points]
    x, y = axis(xs, x_label, log_x), axis(ys, y_label)
    px, py = _place(x, y)
    taken = [(px(p.x) - 5, py(p.y) - 5, px(p.x) + 5, py(p.y) + 5) for p in points]
    body, drawn = [], {}
    if front:
        stairs = [(px(points[front[0]].x), py(points[front[0]].y))]
        for i in front[1:]:
            stairs += [(px(points[i].x), stairs[-1][1]), (px(points[i].x), py(points[i].y))]
        stairs.append((WIDTH - RIGHT, stairs[-1][1]))
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in stairs)
        body.append(Markup('<polyline class="front" points="{}"/>').format(path))
        taken += [(min(a, c) - 1, min(b, d) - 1, max(a, c) + 1, max(b, d) + 1) for (a, b), (c, d) in pairwise(stairs)]
    if reference:
        width = CHARACTER * len(reference[1])
        taken.append((WIDTH - RIGHT - width, py(reference[0]) - 18, WIDTH - RIGHT, py(reference[0]) + 1))
    for i in sorted(range(len(points)), key=lambda i: i not in front):
        p = points[i]
        at = px(p.x), py(p.y)
        spread = Markup("")
        if p.spread:
            spread = Markup('<line class="spread" x1="{0:.1f}" x2="{0:.1f}" y1="{1:.1f}" y2="{2:.1f}"/>').format(at[0], py(p.y - p.spread), py(p.y + p.spread))
        label = Markup("")
        if p.labelled and (place := _free_place(*at, 1.1 * CHARACTER * len(p.label), taken, [(px(o.x), py(o.y)) for o in points if o is not p])):
            (left, top, anchor), box = place
            taken.append(box)
            label = Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(left, top, anchor, p.label)
        said = f"{p.label}: {y_label} {p.y:.4g}{f' ± {p.spread:.2g}' if p.spread else ''}, {x_label} {p.x:,.4g}"
        point = Markup('<g class="{}">{}<circle cx="{:.1f}" cy="{:.1f}" r="5"><title>{}</title></circle>{}</g>').format(
            "member" if i in front else "other", spread, *at, said, label
        )
        drawn[i] = Markup('<a href="{}">{}</a>').format(p.href, point) if p.href else point
    body += [drawn[i] for i in sorted(drawn, key=lambda i: i in front)]  # the front hides others, not they it
    return _frame(x, y, body, described_by, reference)


def heat_map(counts: Counter, labels: list[str], described_by: str) -> Markup:
    """`counts[(expected, predicted)]` as a square: rows expected, columns predicted, shade by the share of the row."""
    shown = {label: label if len(label) <= 28 else label[:27] + "…" for label in labels}
    cell = max(15, min(34, 640 / len(labels)))
    margin = CHARACTER * max(map(len, shown.values())) + 14
    side = cell * len(labels)
    height, width = margin * 0.74 + side + 8, margin + side + margin * 0.6
    place = {label: i * cell for i, label in enumerate(labels)}
    totals = Counter()
    for (expected, _), n in counts.items():
        totals[expected] += n
    top = height - side - 8
    parts = [
        Markup('<svg class="heat" viewBox="0 0 {0:.0f} {1:.0f}" style="width:{0:.0f}px" role="img" aria-labelledby="{2}">').format(width, height, described_by),
        Markup('<rect class="field" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>').format(margin, top, side, side),
    ]
    for label in labels:
        middle = place[label] + cell / 2
        parts.append(Markup('<text x="{:.1f}" y="{:.1f}" dy="4" text-anchor="end">{}</text>').format(margin - 8, top + middle, shown[label]))
        parts.append(Markup('<text transform="translate({:.1f} {:.1f}) rotate(-45)">{}</text>').format(margin + middle + 3, top - 7, shown[label]))
    for (expected, predicted), n in sorted(counts.items()):
        share = n / totals[expected]
        kind = "right" if expected == predicted else "wrong"
        x, y = margin + place[predicted], top + place[expected]
        parts.append(
            Markup(
                '<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" fill-opacity="{:.2f}">'
                "<title>expected {}, predicted {}: {:,} ({:.0%})</title></rect>"
            ).format(kind, x + 0.5, y + 0.5, cell - 1, cell - 1, 0.2 + 0.38 * math.sqrt(share), expected, predicted, n, share)
        )
        if cell >= 22:
            parts.append(Markup('<text class="count" x="{:.1f}" y="{:.1f}" dy="4" text-anchor="middle">{}</text>').format(x + cell / 2, y + cell / 2, n))
    return Markup("").join([*parts, Markup("</svg>")])
