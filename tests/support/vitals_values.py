"""Vitals of an agent, with what a test does not care about filled in."""

from core.fleet_state import AgentVitals, Energy, MachineHealth, Usage

MIB = 1 << 20


def made_vitals(
    edge: int = 0,
    heavy: int = 0,
    *,
    refused: int = 0,
    failed: int = 0,
    uptime_s: float = 100.0,
    rss_bytes: int = 80 * MIB,
    available_bytes: int = 400 * MIB,
    temperature_c: float | None = 48.5,
    load: float = 0.25,
    energy: Energy | None = None,
) -> AgentVitals:
    usage = Usage(edge, heavy, refused, failed)
    return AgentVitals(usage, uptime_s, MachineHealth(rss_bytes, available_bytes, temperature_c, load), energy)
