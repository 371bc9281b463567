"""Where a machine's energy can be read: RAPL counters, a battery that is being used up, or else a stated model.

Each source gives the joules that the whole machine took since it was asked last, or None where it cannot say: no such
device, no right to read it, a device that went away, a number that cannot be. Sources: Linux,
Documentation/power/powercap/powercap.rst and Documentation/ABI/testing/sysfs-class-power.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

from core.fleet_state import EnergyMethod

# Chosen: more than any machine takes that runs an agent. What is above is a counter that was reset, as by a suspend.
MAX_WATTS = 2000.0
_MICRO = 1e-6
_JOULES_PER_WH = 3600.0


class Window(NamedTuple):
    """The time since a source was asked last, and the share of it in which the machine's processors were busy."""

    seconds: float
    busy_share: float


class Source(Protocol):
    method: EnergyMethod

    def joules(self, window: Window) -> float | None:
        """Return what the machine took in `window`; None: unknown. To be called for every window, in order."""
        ...


class Rapl:
    """The counters of the processor packages, and of memory where it has one of its own; they wrap around."""

    method = EnergyMethod.RAPL

    def __init__(self, *, root: Path = Path("/")) -> None:
        self._folder = root / "sys" / "class" / "powercap"
        # Microjoules by zone, when they were read last.
        self._known: Mapping[Path, int] = {}

    def joules(self, window: Window) -> float | None:
        known, self._known = self._known, self._read()
        # A zone that came or went: the sum would be of something else.
        if not known or known.keys() != self._known.keys():
            return None
        micro = sum(_grown(zone, known[zone], now) for zone, now in self._known.items())
        return _plausible(micro * _MICRO, window)

    def _read(self) -> Mapping[Path, int]:
        read = {zone: _number(zone / "energy_uj") for zone in self._folder.glob("intel-rapl:*") if _counts(zone)}
        values = {zone: number for zone, number in read.items() if number is not None}
        # Part of the machine is not the machine.
        return values if len(values) == len(read) else {}


class Battery:
    """What is drawn from the batteries, while the machine runs on them."""

    method = EnergyMethod.BATTERY

    def __init__(self, *, root: Path = Path("/")) -> None:
        self._folder = root / "sys" / "class" / "power_supply"
        self._left_wh: dict[Path, float] = {}

    def joules(self, window: Window) -> float | None:
        drawn = [self._drawn(supply, window) for supply in self._folder.glob("*") if _is_discharging(supply)]
        known = [joules for joules in drawn if joules is not None]
        return _plausible(sum(known), window) if known and len(known) == len(drawn) else None

    def _drawn(self, supply: Path, window: Window) -> float | None:
        watts = _watts(supply)
        if watts is not None:
            return watts * window.seconds
        left = _number(supply / "energy_now")
        if left is None:
            return None
        before_wh, self._left_wh[supply] = self._left_wh.get(supply), left * _MICRO
        return None if before_wh is None else (before_wh - left * _MICRO) * _JOULES_PER_WH


class Model:
    """An assumption: so much at rest, so much with every processor busy, and a line between the two."""

    method = EnergyMethod.MODEL

    def __init__(self, *, idle_watts: float, max_watts: float) -> None:
        self._idle_watts = idle_watts
        self._max_watts = max_watts

    def joules(self, window: Window) -> float | None:
        return (self._idle_watts + window.busy_share * (self._max_watts - self._idle_watts)) * window.seconds


def _counts(zone: Path) -> bool:
    """Say whether a zone is to be added up: `core` and `uncore` are parts of a package, packages of `psys`."""
    name = _text(zone / "name")
    return name.startswith("package") or name == "dram"


def _grown(zone: Path, before: int, now: int) -> int:
    """Return by how much a counter has grown that begins anew after its range."""
    if now >= before:
        return now - before
    span = _number(zone / "max_energy_range_uj")
    # Without a range nothing tells how far it went; far too much is no number either.
    return now - before + span if span else -1


def _is_discharging(supply: Path) -> bool:
    return (
        _text(supply / "type") == "Battery"
        # Those of a mouse or a headset.
        and _text(supply / "scope") != "Device"
        and _text(supply / "status") == "Discharging"
    )


def _watts(supply: Path) -> float | None:
    power = _number(supply / "power_now")
    if power is not None:
        return abs(power) * _MICRO
    # Some drivers count what flows out as negative.
    amperes, volts = _number(supply / "current_now"), _number(supply / "voltage_now")
    return None if amperes is None or volts is None else abs(amperes) * _MICRO * volts * _MICRO


def _plausible(joules: float, window: Window) -> float | None:
    return joules if 0 <= joules <= MAX_WATTS * window.seconds else None


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except (OSError, ValueError):
        return ""
