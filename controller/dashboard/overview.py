"""What somebody should look at, in order of urgency, each with what to do about it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from controller.dashboard.device_list import Device, FleetSnapshot, expiring
from controller.dashboard.texts import span_text
from controller.fleet.restoration import Restoration
from controller.signing.model import SigningStatus
from core.fleet_state import Problem

# `timestamp` is signed anew each day for a week: one with less left shows that this does not work.
CATALOGUE_WARNING = timedelta(days=3)
# Chosen: longer than a restart of an agent or of its router.
AWAY_AFTER = timedelta(minutes=2)
# Named one by one up to here, counted beyond.
_MAX_NAMED = 5

_OFFLINE_REMEDY = "An agent goes on answering without us. Check power and network, then `nanofleet-agent status` there."

Severity = Literal["bad", "warn"]


@dataclass(frozen=True, slots=True)
class Alert:
    severity: Severity
    title: str
    remedy: str
    link: str


def alerts_of(
    fleet: FleetSnapshot, signing: SigningStatus, restoration: Restoration | None, *, now: datetime
) -> tuple[Alert, ...]:
    alerts = [*_restored(restoration), *_problems(fleet.devices), *_offline(fleet.devices, now)]
    alerts += [*_certificates(fleet, now), *_catalogue(signing, now)]
    return tuple(sorted(alerts, key=lambda alert: alert.severity != "bad"))


def _restored(restoration: Restoration | None) -> Iterator[Alert]:
    if restoration is not None and restoration.is_open:
        yield Alert(
            "bad",
            f"Restored from a backup of {restoration.backup_at:%Y-%m-%d %H:%M} UTC; nothing is pushed",
            "See what agents run with `nanofleet controller drift`, then `nanofleet controller confirm-restore`.",
            "/devices",
        )


def _problems(devices: Sequence[Device]) -> Iterator[Alert]:
    failed = [device for device in devices if device.failed]
    for device in failed[:_MAX_NAMED]:
        slot = device.failed[0]
        yield Alert("bad", f"{slot.slot.model} failed on {device.id}", _words(slot.problem), f"/devices/{device.id}")
    yield from _more(failed, "devices with a failed model", "/devices?state=attention")
    rejected = [device for device in devices if device.view.agent.rejection is not None]
    for device in rejected[:_MAX_NAMED]:
        reason = _words(device.view.agent.rejection)
        yield Alert("bad", f"{device.id} refused what it shall run", reason, f"/devices/{device.id}")
    yield from _more(rejected, "devices that refused what they shall run", "/devices?state=attention")
    waiting = [device for device in devices if device.waiting]
    if waiting:
        yield Alert(
            "warn",
            f"{_devices(len(waiting))} on a metered link wait for your word",
            "Open the device and allow the transfer of the model that waits.",
            f"/devices/{waiting[0].id}" if len(waiting) == 1 else "/devices?state=attention",
        )


def _offline(devices: Sequence[Device], now: datetime) -> Iterator[Alert]:
    away = [
        device
        for device in devices
        if not device.view.is_online and not device.is_banned and now - device.view.agent.last_seen_at > AWAY_AFTER
    ]
    if not away:
        return
    if len(away) == 1:
        gone = span_text(now - away[0].view.agent.last_seen_at)
        yield Alert("warn", f"{away[0].id} has been offline for {gone}", _OFFLINE_REMEDY, f"/devices/{away[0].id}")
    else:
        yield Alert("warn", f"{_devices(len(away))} are offline", _OFFLINE_REMEDY, "/devices?state=offline")


def _certificates(fleet: FleetSnapshot, now: datetime) -> Iterator[Alert]:
    soon = expiring(fleet.devices, now)
    for device in soon[:_MAX_NAMED]:
        assert device.identity is not None
        left = span_text(device.identity.not_after - now)
        yield Alert(
            "warn",
            f"The certificate of {device.id} ends in {left}",
            "It should have renewed itself: check that the agent reaches the enrolment port.",
            f"/devices/{device.id}",
        )
    yield from _more(soon, "certificates end soon", "/devices")


def _catalogue(signing: SigningStatus, now: datetime) -> Iterator[Alert]:
    for role in signing.roles:
        if role.expires_at - now < CATALOGUE_WARNING:
            yield Alert(
                "bad" if role.expires_at <= now else "warn",
                f"The catalogue's {role.role} ends {_when(role.expires_at, now)}",
                "Its keys are not here: run `nanofleet signing stage`, sign where they are, then publish.",
                "/models",
            )
    for staged in signing.staged:
        missing = staged.threshold - staged.signatures
        yield Alert(
            "warn",
            f"{staged.role} version {staged.version} waits for {missing} signature{'s' if missing != 1 else ''}",
            "Run `nanofleet signing stage`, sign the file where the keys are, and `nanofleet signing publish` it.",
            "/models",
        )


def _when(expires_at: datetime, now: datetime) -> str:
    return f"in {span_text(expires_at - now)}" if expires_at > now else "already"


def _more(devices: Sequence[Device], what: str, link: str) -> Iterator[Alert]:
    if len(devices) > _MAX_NAMED:
        yield Alert("bad", f"{len(devices) - _MAX_NAMED} more {what}", "Open the list to see all of them.", link)


def _words(problem: Problem | None) -> str:
    return "It gave no reason; see its log." if problem is None else problem.message


def _devices(count: int) -> str:
    return "1 device" if count == 1 else f"{count} devices"
