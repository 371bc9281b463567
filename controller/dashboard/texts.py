"""Numbers, times and sizes as people read them; the filters of the templates."""

from datetime import UTC, datetime, timedelta

_BYTES_STEP = 1000
NONE = "\u2013"


def size_text(size_bytes: float | None) -> str:
    """Return bytes with three digits: `812 B`, `5.70 kB`, `313 kB`, `1.20 GB`."""
    if size_bytes is None:
        return NONE
    value = float(size_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < _BYTES_STEP:
            return f"{value:.0f} B" if unit == "B" else f"{three_digits(value)} {unit}"
        value /= _BYTES_STEP
    return f"{three_digits(value)} TB"


def duration_text(duration_us: float | None) -> str:
    """Return microseconds with three digits: `84 µs`, `1.24 ms`, `310 ms`, `2.50 s`."""
    if duration_us is None:
        return NONE
    if duration_us < 1000:
        return f"{duration_us:.0f} µs"
    if duration_us < 1_000_000:
        return f"{three_digits(duration_us / 1000)} ms"
    return f"{three_digits(duration_us / 1_000_000)} s"


def three_digits(value: float) -> str:
    magnitude = abs(value)
    return f"{value:.{2 if magnitude < 9.995 else 1 if magnitude < 99.95 else 0}f}"


def percent_text(ratio: float | None) -> str:
    if ratio is None:
        return NONE
    percent = ratio * 100
    return f"{percent:.0f} %" if percent in (0, 100) else f"{percent:.1f} %" if percent >= 1 else f"{percent:.2f} %"


def rate_text(per_s: float | None) -> str:
    return NONE if per_s is None else f"{three_digits(per_s)}/s"


def ago_text(then: datetime, now: datetime) -> str:
    """Return how long ago it was, in one unit: `just now`, `40 s ago`, `3 min ago`, `2 days ago`."""
    passed = now - then
    return "just now" if passed < timedelta(seconds=5) else f"{span_text(passed)} ago"


def span_text(span: timedelta) -> str:
    seconds = max(0, int(span.total_seconds()))
    for unit, length_s in (("day", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= length_s:
            count = seconds // length_s
            return f"{count} {unit}{'s' if unit == 'day' and count != 1 else ''}"
    return f"{seconds} s"


def instant_text(instant: datetime) -> str:
    return f"{instant.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


def clock_text(start_us: int) -> str:
    """Return the time of day of microseconds since the epoch, with milliseconds."""
    return f"{datetime.fromtimestamp(start_us / 1e6, UTC):%H:%M:%S.%f}"[:-3]


def count_text(count: int) -> str:
    return f"{count:,}".replace(",", "\u202f")


def digest_text(digest: str | None) -> str:
    """Return the beginning of a digest, enough to tell it from others on a page."""
    return NONE if digest is None else digest.removeprefix("sha256:")[:12]
