"""Fleet values <-> protobuf messages, in pairs; the only place that knows both.

Decoding checks everything a peer can send: names, digests, bounds. What does not fit raises InvalidRequest.
"""

from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp

from core.digest import parse_digest
from core.errors import InvalidName, InvalidRequest
from core.fleet_state import (
    AgentHello,
    AgentVitals,
    CatalogueVersions,
    DesiredState,
    Energy,
    EnergyMethod,
    MachineHealth,
    MetadataFile,
    Position,
    Problem,
    PushResult,
    ReportedState,
    SignedAssignment,
    Slot,
    SlotPhase,
    SlotReport,
    Transfer,
    Usage,
)
from core.ids import ANY_AGENT, AgentId, ModelName, SiteId, VariantName, checked_name
from protos.catalogue.v1 import catalogue_pb2
from protos.fleet.v1 import fleet_pb2 as pb

MAX_SLOTS = 256
MAX_TAGS = 64
MAX_HELD_MANIFESTS = 64
# As promised in fleet.proto.
MAX_METADATA_FILES = 64
MAX_METADATA_BYTES = 8 << 20
# Derived: 256 slots of three names and a digest stay below half of it.
MAX_ASSIGNMENT_BYTES = 1 << 18
# Peer text is kept for people to read, not for storage without end.
MAX_TEXT_CHARS = 512
# What fits into a signed 64-bit column; unsigned ones travel.
MAX_NUMBER = (1 << 63) - 1

# Derived: an uptime of three centuries; nothing that is measured is larger.
MAX_MEASURE = 1e10

_PHASE_TO_WIRE = {
    SlotPhase.FETCHING: pb.SLOT_PHASE_FETCHING,
    SlotPhase.WAITING: pb.SLOT_PHASE_WAITING,
    SlotPhase.SELF_TEST: pb.SLOT_PHASE_SELF_TEST,
    SlotPhase.LOADING: pb.SLOT_PHASE_LOADING,
    SlotPhase.PROBATION: pb.SLOT_PHASE_PROBATION,
    SlotPhase.READY: pb.SLOT_PHASE_READY,
    SlotPhase.FAILED: pb.SLOT_PHASE_FAILED,
}
_PHASE_FROM_WIRE = {wire: phase for phase, wire in _PHASE_TO_WIRE.items()}

_METHOD_TO_WIRE = {
    EnergyMethod.RAPL: pb.ENERGY_METHOD_RAPL,
    EnergyMethod.BATTERY: pb.ENERGY_METHOD_BATTERY,
    EnergyMethod.MODEL: pb.ENERGY_METHOD_MODEL,
}
_METHOD_FROM_WIRE = {wire: method for method, wire in _METHOD_TO_WIRE.items()}


def encode_position(position: Position) -> pb.Position:
    return pb.Position(epoch=position.epoch, generation=position.generation)


def decode_position(message: pb.Position) -> Position:
    return Position(_checked_number("epoch", message.epoch), _checked_number("generation", message.generation))


def encode_slot(slot: Slot) -> pb.Slot:
    return pb.Slot(model=slot.model, version=slot.version, variant=slot.variant, manifest_digest=slot.manifest_digest)


def decode_slot(message: pb.Slot) -> Slot:
    if not 1 <= message.version <= 1 << 31:
        raise InvalidRequest(f"slot {message.model[:80]!r}: expected a version of at least 1, got {message.version}")
    return Slot(
        ModelName(checked_name(message.model, kind="model")),
        message.version,
        VariantName(checked_name(message.variant, kind="variant")),
        parse_digest(message.manifest_digest),
    )


def encode_desired(state: DesiredState) -> pb.DesiredState:
    message = pb.DesiredState(
        agent_id=state.agent_id,
        position=encode_position(state.position),
        slots=[encode_slot(slot) for slot in state.slots],
    )
    message.issued_at.FromDatetime(state.issued_at)
    if state.expires_at is not None:
        message.expires_at.FromDatetime(state.expires_at)
    return message


def decode_desired(message: pb.DesiredState) -> DesiredState:
    _require_at_most(MAX_SLOTS, len(message.slots), "slots")
    slots = tuple(decode_slot(slot) for slot in message.slots)
    if len({slot.model for slot in slots}) != len(slots):
        raise InvalidRequest("desired state: expected every model in one slot only")
    return DesiredState(
        _decode_agent(message.agent_id),
        decode_position(message.position),
        _decode_instant("issued_at", message.issued_at),
        slots,
        _decode_instant("expires_at", message.expires_at) if message.HasField("expires_at") else None,
    )


def encode_assignment(signed: SignedAssignment) -> pb.SignedAssignment:
    return pb.SignedAssignment(
        payload=signed.payload,
        signature=signed.signature,
        key_id=signed.key_id,
        catalogue=[catalogue_pb2.MetadataFile(name=file.name, content=file.content) for file in signed.catalogue],
    )


def decode_assignment(message: pb.SignedAssignment) -> SignedAssignment:
    """Return the assignment as it came: bounded, nothing of it verified."""
    _require_at_most(MAX_ASSIGNMENT_BYTES, len(message.payload), "assignment: payload bytes")
    _require_at_most(MAX_METADATA_FILES, len(message.catalogue), "assignment: metadata files")
    total_bytes = sum(len(file.content) for file in message.catalogue)
    _require_at_most(MAX_METADATA_BYTES, total_bytes, "assignment: metadata bytes")
    return SignedAssignment(
        message.payload,
        message.signature,
        message.key_id[:MAX_TEXT_CHARS],
        tuple(MetadataFile(file.name[:MAX_TEXT_CHARS], file.content) for file in message.catalogue),
    )


def encode_hello(hello: AgentHello) -> pb.Hello:
    return pb.Hello(
        agent_id=hello.agent_id,
        site=hello.site,
        software_version=hello.software_version,
        boot_id=hello.boot_id,
        applied=encode_position(hello.applied),
        tags=hello.tags,
        catalogue=pb.CatalogueVersions(root=hello.catalogue.root, timestamp=hello.catalogue.timestamp),
        held_manifests=hello.held_manifests,
        metered=hello.is_metered,
        trust_bundle_sha256=hello.trust_bundle_sha256,
    )


def decode_hello(message: pb.Hello) -> AgentHello:
    _require_at_most(MAX_TAGS, len(message.tags), "tags")
    _require_at_most(MAX_HELD_MANIFESTS, len(message.held_manifests), "held manifests")
    _require_at_most(32, len(message.trust_bundle_sha256), "trust_bundle_sha256: bytes")
    return AgentHello(
        _decode_agent(message.agent_id),
        SiteId(checked_name(message.site, kind="site")),
        message.software_version[:MAX_TEXT_CHARS],
        message.boot_id[:MAX_TEXT_CHARS],
        decode_position(message.applied),
        tuple(tag[:MAX_TEXT_CHARS] for tag in message.tags),
        CatalogueVersions(
            _checked_number("catalogue root", message.catalogue.root),
            _checked_number("catalogue timestamp", message.catalogue.timestamp),
        ),
        tuple(parse_digest(digest) for digest in message.held_manifests),
        message.metered,
        message.trust_bundle_sha256,
    )


def encode_push_result(result: PushResult) -> pb.PushResult:
    position = encode_position(result.position)
    if result.problem is None:
        return pb.PushResult(position=position, applied=pb.Applied())
    return pb.PushResult(position=position, rejected=_encode_problem(result.problem))


def decode_push_result(message: pb.PushResult) -> PushResult:
    outcome = message.WhichOneof("outcome")
    if outcome is None:
        raise InvalidRequest("push result: expected applied or rejected, got neither")
    problem = _decode_problem(message.rejected) if outcome == "rejected" else None
    return PushResult(decode_position(message.position), problem)


def encode_reported(state: ReportedState) -> pb.ReportedState:
    return pb.ReportedState(
        applied=encode_position(state.applied), slots=[_encode_slot_report(report) for report in state.slots]
    )


def decode_reported(message: pb.ReportedState) -> ReportedState:
    _require_at_most(MAX_SLOTS, len(message.slots), "slots")
    return ReportedState(
        decode_position(message.applied), tuple(_decode_slot_report(report) for report in message.slots)
    )


def encode_vitals(vitals: AgentVitals) -> pb.Vitals:
    usage, health = vitals.usage, vitals.health
    return pb.Vitals(
        answered_edge=usage.answered_edge,
        answered_heavy=usage.answered_heavy,
        refused=usage.refused,
        failed=usage.failed,
        uptime_s=vitals.uptime_s,
        rss_bytes=health.rss_bytes,
        available_bytes=health.available_bytes,
        temperature_c=health.temperature_c,
        load=health.load,
        energy=None if vitals.energy is None else _encode_energy(vitals.energy),
    )


def decode_vitals(message: pb.Vitals) -> AgentVitals:
    usage = Usage(
        _checked_number("answered_edge", message.answered_edge),
        _checked_number("answered_heavy", message.answered_heavy),
        _checked_number("refused", message.refused),
        _checked_number("failed", message.failed),
    )
    health = MachineHealth(
        _checked_number("rss_bytes", message.rss_bytes),
        _checked_number("available_bytes", message.available_bytes),
        _checked_measure("temperature_c", message.temperature_c, least=-MAX_MEASURE)
        if message.HasField("temperature_c")
        else None,
        _checked_measure("load", message.load),
    )
    energy = _decode_energy(message.energy) if message.HasField("energy") else None
    return AgentVitals(usage, _checked_measure("uptime_s", message.uptime_s), health, energy)


def _encode_energy(energy: Energy) -> pb.Energy:
    return pb.Energy(
        method=_METHOD_TO_WIRE[energy.method],
        joules=energy.joules,
        answers=energy.answers,
        watts=energy.watts,
        recent_joules=energy.recent_joules,
        recent_answers=energy.recent_answers,
    )


def _decode_energy(message: pb.Energy) -> Energy | None:
    method = _METHOD_FROM_WIRE.get(message.method)
    if method is None:
        # A figure without its method is worth nothing; a newer agent may have one that is not known here.
        return None
    return Energy(
        method,
        _checked_measure("joules", message.joules),
        _checked_number("answers", message.answers),
        _checked_measure("watts", message.watts),
        _checked_measure("recent_joules", message.recent_joules),
        _checked_number("recent_answers", message.recent_answers),
    )


def _encode_slot_report(report: SlotReport) -> pb.SlotReport:
    return pb.SlotReport(
        slot=encode_slot(report.slot),
        phase=_PHASE_TO_WIRE[report.phase],
        stored_bytes=report.stored_bytes,
        total_bytes=report.total_bytes,
        problem=None if report.problem is None else _encode_problem(report.problem),
        transfer=None if report.transfer is None else _encode_transfer(report.transfer),
    )


def _decode_slot_report(message: pb.SlotReport) -> SlotReport:
    phase = _PHASE_FROM_WIRE.get(message.phase)
    if phase is None:
        raise InvalidRequest(f"slot report: expected a known phase, got {message.phase}")
    problem = _decode_problem(message.problem) if message.HasField("problem") else None
    return SlotReport(
        decode_slot(message.slot),
        phase,
        _checked_number("stored_bytes", message.stored_bytes),
        _checked_number("total_bytes", message.total_bytes),
        problem,
        _decode_transfer(message.transfer) if message.HasField("transfer") else None,
    )


def _encode_transfer(transfer: Transfer) -> pb.Transfer:
    return pb.Transfer(
        wire_bytes=transfer.wire_bytes,
        brought_bytes=transfer.brought_bytes,
        rate_bytes_per_s=transfer.rate_bytes_per_s,
        same_chunks=transfer.same_chunks,
        raw_chunks=transfer.raw_chunks,
        zstd_chunks=transfer.zstd_chunks,
        difference_chunks=transfer.difference_chunks,
    )


def _decode_transfer(message: pb.Transfer) -> Transfer:
    return Transfer(
        _checked_number("wire_bytes", message.wire_bytes),
        _checked_number("brought_bytes", message.brought_bytes),
        _checked_number("rate_bytes_per_s", message.rate_bytes_per_s),
        message.same_chunks,
        message.raw_chunks,
        message.zstd_chunks,
        message.difference_chunks,
    )


def _encode_problem(problem: Problem) -> pb.Problem:
    return pb.Problem(code=problem.code, message=problem.message)


def _decode_problem(message: pb.Problem) -> Problem:
    return Problem(message.code[:MAX_TEXT_CHARS], message.message[:MAX_TEXT_CHARS])


def _decode_agent(text: str) -> AgentId:
    agent_id = AgentId(checked_name(text, kind="agent"))
    if agent_id == ANY_AGENT:
        raise InvalidName(f"agent: {ANY_AGENT!r} is the name for whichever agent of a site; choose another")
    return agent_id


def _decode_instant(what: str, instant: Timestamp) -> datetime:
    try:
        return instant.ToDatetime(tzinfo=UTC)
    except (ValueError, OverflowError) as error:
        raise InvalidRequest(f"{what}: expected an instant of the years 1 to 9999, got {error}") from error


def _checked_measure(what: str, measure: float, *, least: float = 0.0) -> float:
    if not least <= measure <= MAX_MEASURE:
        raise InvalidRequest(f"{what}: expected a number of {least:g} to {MAX_MEASURE:g}, got {measure:g}")
    return measure


def _checked_number(what: str, number: int) -> int:
    if number > MAX_NUMBER:
        raise InvalidRequest(f"{what}: expected at most {MAX_NUMBER}, got {number}")
    return number


def _require_at_most(bound: int, got: int, what: str) -> None:
    if got > bound:
        raise InvalidRequest(f"{what}: expected at most {bound}, got {got}")
