"""Fleet values survive the wire; what a hostile peer sends is refused with a typed error."""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from google.protobuf.message import DecodeError
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st

from core import fleet_wire
from core.digest import digest_of
from core.errors import InvalidName, InvalidRequest
from core.fleet_state import (
    NOWHERE,
    AgentHello,
    AgentVitals,
    DesiredState,
    Energy,
    EnergyMethod,
    MachineHealth,
    Position,
    Problem,
    PushResult,
    ReportedState,
    Slot,
    SlotPhase,
    SlotReport,
    Usage,
)
from core.ids import AgentId
from protos.fleet.v1 import fleet_pb2 as pb
from tests.support.open_inference_strategies import PATIENT, texts

names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True).filter(lambda name: name != "any")
numbers = st.integers(0, fleet_wire.MAX_NUMBER)
positions = st.builds(Position, numbers, numbers)
problems = st.builds(Problem, texts, texts)
slots = st.builds(Slot, names, st.integers(1, 1 << 31), names, st.binary().map(digest_of))
reports = st.builds(SlotReport, slots, st.sampled_from(SlotPhase), numbers, numbers, st.none() | problems)
instants = st.datetimes(timezones=st.just(UTC))

measures = st.floats(0, fleet_wire.MAX_MEASURE)
usages = st.builds(Usage, numbers, numbers, numbers, numbers)
machines = st.builds(MachineHealth, numbers, numbers, st.none() | st.floats(-300, 300), measures)
energies = st.builds(Energy, st.sampled_from(EnergyMethod), measures, numbers, measures, measures, numbers)

DIGEST = digest_of(b"")
SLOT = pb.Slot(model="m", version=1, variant="v", manifest_digest=DIGEST)


@PATIENT
@given(st.builds(DesiredState, names, positions, instants, st.lists(slots, unique_by=lambda s: s.model).map(tuple)))
def test_desired_state_survives_the_wire(state: DesiredState) -> None:
    content = fleet_wire.encode_desired(state).SerializeToString()
    assert fleet_wire.decode_desired(pb.DesiredState.FromString(content)) == state


@PATIENT
@given(st.builds(ReportedState, positions, st.lists(reports, max_size=4).map(tuple)))
def test_reported_state_survives_the_wire(state: ReportedState) -> None:
    content = fleet_wire.encode_reported(state).SerializeToString()
    assert fleet_wire.decode_reported(pb.ReportedState.FromString(content)) == state


@PATIENT
@given(st.builds(AgentHello, names, names, texts, texts, positions, st.lists(texts).map(tuple)))
def test_a_hello_survives_the_wire(hello: AgentHello) -> None:
    content = fleet_wire.encode_hello(hello).SerializeToString()
    assert fleet_wire.decode_hello(pb.Hello.FromString(content)) == hello


@PATIENT
@given(st.builds(PushResult, positions, st.none() | problems))
def test_a_push_result_survives_the_wire(result: PushResult) -> None:
    content = fleet_wire.encode_push_result(result).SerializeToString()
    assert fleet_wire.decode_push_result(pb.PushResult.FromString(content)) == result


def test_positions_compare_epoch_first_and_nowhere_is_before_all() -> None:
    assert NOWHERE < Position(0, 1) < Position(1, 0) < Position(1, 5) < Position(2, 0)


@pytest.mark.parametrize(
    "changes",
    [
        {"model": ""}, {"model": "a/b"}, {"model": "x" * 1000}, {"variant": "../v"}, {"version": 0}, {"version": -1},
        {"version": 1 << 40}, {"manifest_digest": ""}, {"manifest_digest": "sha256:zz"},
    ],
)  # fmt: skip
def test_a_slot_that_names_nothing_is_refused(changes: dict[str, Any]) -> None:
    message = pb.Slot()
    message.CopyFrom(SLOT)
    for field, value in changes.items():
        setattr(message, field, value)
    with pytest.raises(InvalidRequest):
        fleet_wire.decode_slot(message)


def test_one_model_in_two_slots_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="one slot only"):
        fleet_wire.decode_desired(pb.DesiredState(agent_id="a", slots=[SLOT, SLOT]))


def test_lists_and_numbers_have_bounds() -> None:
    many = [SLOT] * (fleet_wire.MAX_SLOTS + 1)
    report = pb.SlotReport(slot=SLOT, phase=pb.SLOT_PHASE_READY, stored_bytes=1 << 63)
    for decode, message in (
        (fleet_wire.decode_desired, pb.DesiredState(agent_id="a", slots=many)),
        (fleet_wire.decode_reported, pb.ReportedState(slots=[pb.SlotReport()] * len(many))),
        (fleet_wire.decode_hello, pb.Hello(agent_id="a", site="s", tags=["t"] * (fleet_wire.MAX_TAGS + 1))),
        (fleet_wire.decode_position, pb.Position(epoch=1 << 63)),
        (fleet_wire.decode_reported, pb.ReportedState(slots=[report])),
    ):
        decoder: Callable[[Any], object] = decode
        with pytest.raises(InvalidRequest, match="expected at most"):
            decoder(message)


def test_long_texts_are_cut() -> None:
    long = "x" * (fleet_wire.MAX_TEXT_CHARS + 1)
    hello = fleet_wire.decode_hello(pb.Hello(agent_id="a", site="s", software_version=long, boot_id=long, tags=[long]))
    assert {len(text) for text in (hello.software_version, hello.boot_id, *hello.tags)} == {fleet_wire.MAX_TEXT_CHARS}


@pytest.mark.parametrize("phase", [pb.SLOT_PHASE_UNSPECIFIED, 99])
def test_an_unknown_phase_is_refused(phase: Any) -> None:
    with pytest.raises(InvalidRequest, match="known phase"):
        fleet_wire.decode_reported(pb.ReportedState(slots=[pb.SlotReport(slot=SLOT, phase=phase)]))


def test_a_push_result_without_outcome_is_not_taken_for_applied() -> None:
    with pytest.raises(InvalidRequest, match="got neither"):
        fleet_wire.decode_push_result(pb.PushResult(position=pb.Position(epoch=1)))


def test_no_agent_may_call_itself_any() -> None:
    with pytest.raises(InvalidName, match="choose another"):
        fleet_wire.decode_hello(pb.Hello(agent_id="any", site="s"))


@pytest.mark.parametrize("seconds", [1 << 60, -(1 << 60)])
def test_an_instant_outside_of_the_calendar_is_refused(seconds: int) -> None:
    with pytest.raises(InvalidRequest, match="issued_at"):
        fleet_wire.decode_desired(pb.DesiredState(agent_id="a", issued_at=Timestamp(seconds=seconds)))


def test_an_instant_keeps_its_microseconds_in_utc() -> None:
    issued_at = datetime(2026, 5, 6, 7, 8, 9, 123456, tzinfo=UTC)
    state = DesiredState(AgentId("a"), NOWHERE, issued_at, ())
    assert fleet_wire.decode_desired(fleet_wire.encode_desired(state)).issued_at == issued_at


@PATIENT
@given(
    st.binary(max_size=100),
    st.sampled_from(
        [
            (pb.Hello, fleet_wire.decode_hello), (pb.DesiredState, fleet_wire.decode_desired),
            (pb.ReportedState, fleet_wire.decode_reported), (pb.PushResult, fleet_wire.decode_push_result),
        ]
    ),
)  # fmt: skip
def test_random_bytes_are_refused_by_parser_or_decoder(
    content: bytes, pair: tuple[Any, Callable[[Any], object]]
) -> None:
    message_type, decode = pair
    try:
        message = message_type.FromString(content)
    except DecodeError:
        return
    try:
        decode(message)
    except InvalidRequest:
        return


@PATIENT
@given(st.builds(AgentVitals, usages, measures, machines, st.none() | energies))
def test_vitals_survive_the_wire(vitals: AgentVitals) -> None:
    content = fleet_wire.encode_vitals(vitals).SerializeToString()
    assert fleet_wire.decode_vitals(pb.Vitals.FromString(content)) == vitals


@pytest.mark.parametrize(
    "message",
    [
        pb.Vitals(answered_edge=1 << 63),
        pb.Vitals(available_bytes=1 << 63),
        pb.Vitals(load=float("nan")),
        pb.Vitals(load=-1.0),
        pb.Vitals(uptime_s=float("inf")),
        pb.Vitals(temperature_c=float("-inf")),
        pb.Vitals(energy=pb.Energy(method=pb.ENERGY_METHOD_RAPL, joules=-1.0)),
        pb.Vitals(energy=pb.Energy(method=pb.ENERGY_METHOD_RAPL, watts=float("nan"))),
        pb.Vitals(energy=pb.Energy(method=pb.ENERGY_METHOD_RAPL, answers=1 << 63)),
    ],
)
def test_vitals_that_nobody_can_have_are_refused(message: pb.Vitals) -> None:
    with pytest.raises(InvalidRequest):
        fleet_wire.decode_vitals(message)


def test_energy_by_a_method_that_is_not_known_here_is_left_out() -> None:
    message = pb.Vitals(answered_edge=3, energy=pb.Energy(joules=5.0))
    vitals = fleet_wire.decode_vitals(message)
    assert (vitals.usage.answered_edge, vitals.energy) == (3, None)
