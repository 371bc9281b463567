"""What must outlive the process for activation to be safe: values, how they change, and their bytes. Pure.

A *trial* is a variant between its switch and its commit. It is on record before it is loaded into this process, so that
a crash in loading counts too. Crashes are counted per trial and not by the clock, which a machine without a battery
sets anew at every start: a trial lasts ten minutes of running, so three crashes in a trial are three in ten minutes.

A variant in *quarantine* failed here and is not tried again by this version of the software; its `fallback` runs.

As bytes: one line with the digest of everything after it, then JSON. States and slots are in the JSON form of their
protobuf messages, so that reading checks names, digests and bounds like a push from the controller.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import orjson
from google.protobuf import json_format
from google.protobuf.message import Message

from core.digest import Digest, digest_of
from core.errors import ErrorCode, IntegrityError, InvalidRequest
from core.fleet_state import DesiredState, Problem, Slot
from core.fleet_wire import decode_desired, decode_slot, encode_desired, encode_slot
from protos.fleet.v1 import fleet_pb2 as pb

# As of delivery.md: "three crashes in ten minutes".
MAX_CRASHES = 3
# Chosen: more than a device can fail in the life of one software version, and small enough to write at once.
MAX_QUARANTINED = 64


@dataclass(frozen=True, slots=True)
class Trial:
    """A variant on probation, what ran before it, and what was seen so far, over all restarts."""

    slot: Slot
    previous: Slot | None
    ran_s: float = 0.0
    requests: int = 0
    failed_requests: int = 0
    crashes: int = 0


@dataclass(frozen=True, slots=True)
class Quarantine:
    slot: Slot
    problem: Problem
    since: datetime
    software_version: str
    fallback: Slot | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """`current` is the state in force: what a restart brings back without asking anybody."""

    current: DesiredState | None = None
    previous: DesiredState | None = None
    trials: tuple[Trial, ...] = ()
    quarantine: tuple[Quarantine, ...] = ()
    # True from start to clean stop: found true at a start, the process before it crashed.
    is_running: bool = False

    def trial_of(self, digest: Digest) -> Trial | None:
        return next((trial for trial in self.trials if trial.slot.manifest_digest == digest), None)

    def quarantined(self, digest: Digest) -> Quarantine | None:
        return next((entry for entry in self.quarantine if entry.slot.manifest_digest == digest), None)

    def slot_of(self, digest: Digest | None) -> Slot | None:
        """Return how a variant that this record knows is called."""
        states = [state for state in (self.current, self.previous) if state is not None]
        slots: list[Slot | None] = [slot for state in states for slot in state.slots]
        slots += [slot for trial in self.trials for slot in (trial.slot, trial.previous)]
        slots += [slot for entry in self.quarantine for slot in (entry.slot, entry.fallback)]
        return next((slot for slot in slots if slot is not None and slot.manifest_digest == digest), None)

    def in_use(self) -> frozenset[Digest]:
        """Return the variants that a restart may bring back: in force, on trial, and what they fall back on."""
        slots = [*(() if self.current is None else self.current.slots)]
        slots += [slot for trial in self.trials for slot in (trial.slot, trial.previous) if slot is not None]
        named = {slot.manifest_digest for slot in slots}
        fallbacks = (entry.fallback for entry in self.quarantine if entry.slot.manifest_digest in named)
        return frozenset([*named, *(slot.manifest_digest for slot in fallbacks if slot is not None)])

    def pins(self) -> frozenset[Digest]:
        """Return the variants that must stay in the store: those in use, and those of the previous state."""
        previous = () if self.previous is None else self.previous.slots
        return self.in_use() | {slot.manifest_digest for slot in previous}

    def in_force(self, state: DesiredState) -> "Record":
        """Return the record with `state` in force, the one it follows as the previous, and only the trials it names."""
        if state == self.current:
            return self
        trials = tuple(trial for trial in self.trials if trial.slot in state.slots)
        return replace(self, current=state, previous=self.current, trials=trials)

    def is_committed(self, slot: Slot) -> bool:
        """Say whether the variant proved itself here: in force and not on trial, or what one on trial falls back on."""
        if self.trial_of(slot.manifest_digest) is not None:
            return False
        known = [*(() if self.current is None else self.current.slots), *(trial.previous for trial in self.trials)]
        return slot in known or any(entry.fallback == slot for entry in self.quarantine)

    def started(self, *, software_version: str, now: datetime) -> "Record":
        """Return the record at the start of a process: crashes counted, trials over that crashed too often."""
        trials = tuple(replace(trial, crashes=trial.crashes + self.is_running) for trial in self.trials)
        others = [entry for entry in self.quarantine if entry.software_version != software_version]
        found = replace(self, trials=trials, is_running=True).released(others)
        for trial in trials:
            if trial.crashes >= MAX_CRASHES:
                entry = Quarantine(trial.slot, _crashed(trial), now, software_version, trial.previous)
                found = found.quarantining(entry)
        return found

    def stopped(self) -> "Record":
        return replace(self, is_running=False)

    def on_trial(self, trial: Trial) -> "Record":
        """Return the record with `trial`, in place of an older word about the same variant.

        A trial that it overtakes stays until the state in force names its variant no longer: a restart before that
        brings it back.
        """
        found = self.ended(trial.slot.manifest_digest)
        return replace(found, trials=(*found.trials, trial))

    def ended(self, digest: Digest) -> "Record":
        """Return the record without the trial of that variant."""
        return replace(self, trials=tuple(trial for trial in self.trials if trial.slot.manifest_digest != digest))

    def quarantining(self, entry: Quarantine) -> "Record":
        """Return the record with `entry` in quarantine, and its trial over if it is on one."""
        digest = entry.slot.manifest_digest
        others = tuple(other for other in self.quarantine if other.slot.manifest_digest != digest)
        return replace(self.ended(digest), quarantine=(*others, entry)[-MAX_QUARANTINED:])

    def released(self, entries: Collection[Quarantine]) -> "Record":
        """Return the record without these entries; one that the state in force names goes on trial again."""
        found = replace(self, quarantine=tuple(entry for entry in self.quarantine if entry not in entries))
        in_force = () if self.current is None else self.current.slots
        for entry in entries:
            if entry.slot in in_force:
                found = found.on_trial(Trial(entry.slot, entry.fallback))
        return found


def quarantine_problem(slot: Slot, problem: Problem) -> Problem:
    """Return `problem` as a person reads it: of which variant, and what to do."""
    return Problem(
        problem.code,
        f"{slot.model} {slot.version} ({slot.variant}) {problem.message}; it is not tried again on this device: "
        f"publish a better one, or stop the agent and let it try: nanofleet-agent retry {slot.model}",
    )


def _crashed(trial: Trial) -> Problem:
    why = f"was on probation when the agent crashed, {trial.crashes} times"
    return quarantine_problem(trial.slot, Problem(ErrorCode.INTERNAL, why))


def encode_record(record: Record, *, sequence: int) -> bytes:
    body = orjson.dumps(
        {
            "sequence": sequence,
            "current": _state_to_json(record.current),
            "previous": _state_to_json(record.previous),
            "trials": [_trial_to_json(trial) for trial in record.trials],
            "quarantine": [_quarantine_to_json(entry) for entry in record.quarantine],
            "is_running": record.is_running,
        }
    )
    return f"{digest_of(body)}\n".encode() + body


def decode_record(content: bytes) -> tuple[int, Record]:
    """Return the sequence number and the record in `content`.

    Raises:
        IntegrityError: truncated or changed since it was written.
        InvalidRequest: whole, but not a record that this version understands.
    """
    checksum, _, body = content.partition(b"\n")
    if checksum != digest_of(body).encode():
        raise IntegrityError(f"journal: expected {digest_of(body)}, got {checksum[:80]!r} over {len(body)} bytes")
    try:
        document = orjson.loads(body)
        return int(document["sequence"]), Record(
            _state_from_json(document["current"]),
            _state_from_json(document["previous"]),
            tuple(_trial_from_json(found) for found in document["trials"]),
            tuple(_quarantine_from_json(found) for found in document["quarantine"]),
            bool(document["is_running"]),
        )
    except (ValueError, KeyError, TypeError, json_format.ParseError) as error:
        raise InvalidRequest(f"journal: expected a record of activation, got {error!r}") from error


def _to_json(message: Message) -> Any:
    return json_format.MessageToDict(message)


def _state_to_json(state: DesiredState | None) -> Any:
    return None if state is None else _to_json(encode_desired(state))


def _state_from_json(document: Any) -> DesiredState | None:
    return None if document is None else decode_desired(json_format.ParseDict(document, pb.DesiredState()))


def _slot_to_json(slot: Slot | None) -> Any:
    return None if slot is None else _to_json(encode_slot(slot))


def _slot_from_json(document: Any) -> Slot:
    return decode_slot(json_format.ParseDict(document, pb.Slot()))


def _optional_slot_from_json(document: Any) -> Slot | None:
    return None if document is None else _slot_from_json(document)


def _trial_to_json(trial: Trial) -> Any:
    return {
        "slot": _slot_to_json(trial.slot),
        "previous": _slot_to_json(trial.previous),
        "ran_s": trial.ran_s,
        "requests": trial.requests,
        "failed_requests": trial.failed_requests,
        "crashes": trial.crashes,
    }


def _trial_from_json(document: Any) -> Trial:
    return Trial(
        _slot_from_json(document["slot"]),
        _optional_slot_from_json(document["previous"]),
        float(document["ran_s"]),
        int(document["requests"]),
        int(document["failed_requests"]),
        int(document["crashes"]),
    )


def _quarantine_to_json(entry: Quarantine) -> Any:
    return {
        "slot": _slot_to_json(entry.slot),
        "code": entry.problem.code,
        "message": entry.problem.message,
        "since": entry.since.isoformat(),
        "software_version": entry.software_version,
        "fallback": _slot_to_json(entry.fallback),
    }


def _quarantine_from_json(document: Any) -> Quarantine:
    return Quarantine(
        _slot_from_json(document["slot"]),
        Problem(str(document["code"]), str(document["message"])),
        datetime.fromisoformat(document["since"]).astimezone(UTC),
        str(document["software_version"]),
        _optional_slot_from_json(document["fallback"]),
    )
