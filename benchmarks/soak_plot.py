"""The memory of a soak's agents over time as an SVG, with what was away meanwhile in the background."""

from collections.abc import Mapping, Sequence

WIDTH, HEIGHT, MARGIN = 900, 320, 50
_COLOURS = ("#0b6e99", "#b5482a", "#4d7c0f")
_SHADES = {"ray": "#f3d9b1", "controller": "#e3d0ec", "broker": "#f4c7c3"}
# A point is mostly narrower than a line.
_MAX_POINTS = 600


def plot(series: Mapping[str, Sequence[tuple[float, float]]], events: Sequence[tuple[str, float, float]]) -> str:
    """Return an image; `series` are (seconds, megabytes) by name, `events` what was away from when to when."""
    end_s = max((points[-1][0] for points in series.values() if points), default=1.0)
    top = 1.15 * max((value for points in series.values() for _, value in points), default=1.0)

    def at(seconds: float, value: float) -> tuple[float, float]:
        x = MARGIN + (WIDTH - 2 * MARGIN) * seconds / end_s
        return round(x, 1), round(HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * value / top, 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for what, begin_s, finish_s in events:
        left, right = at(begin_s, 0)[0], at(finish_s, 0)[0]
        parts.append(
            f'<rect x="{left}" y="{MARGIN}" width="{max(2.0, right - left):.1f}" height="{HEIGHT - 2 * MARGIN}" '
            f'fill="{_SHADES.get(what, "#dddddd")}"><title>{what} away</title></rect>'
        )
        parts.append(f'<text x="{left}" y="{MARGIN - 6}" fill="#555555">{what}</text>')
    for value in (0, top / 2, top):
        x, y = at(0, value)
        parts.append(f'<line x1="{x}" x2="{WIDTH - MARGIN}" y1="{y}" y2="{y}" stroke="#cccccc"/>')
        parts.append(f'<text x="{x - 6}" y="{y + 4}" text-anchor="end">{value:.0f} MB</text>')
    for (name, points), colour in zip(series.items(), _COLOURS, strict=False):
        thinned = points[:: max(1, len(points) // _MAX_POINTS)]
        path = " ".join(f"{x},{y}" for x, y in (at(*point) for point in thinned))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        if points:
            x, y = at(*points[-1])
            parts.append(f'<text x="{x - 60}" y="{y - 8}" fill="{colour}">{name}</text>')
    parts.append(f'<text x="{WIDTH - MARGIN}" y="{HEIGHT - 18}" text-anchor="end">{end_s / 60:.1f} minutes</text>')
    return "\n".join([*parts, "</svg>", ""])
