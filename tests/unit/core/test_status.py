"""The error tree and the one status table, proven complete and unambiguous."""

import re
from collections.abc import Iterator
from http import HTTPStatus

import grpc
import pytest

from core import errors
from core.errors import ErrorCode, InternalError, InvalidRequest, NanofleetError, Unavailable
from core.status import STATUS, error_from_grpc, error_from_http


def tree(base: type[NanofleetError] = NanofleetError) -> Iterator[type[NanofleetError]]:
    for kind in base.__subclasses__():
        if kind.__module__ == errors.__name__:
            yield kind
            yield from tree(kind)


def test_every_code_has_a_status_and_no_two_share_one() -> None:
    assert set(STATUS) == set(ErrorCode)
    assert len({status.grpc for status in STATUS.values()}) == len(STATUS)
    assert len({status.http for status in STATUS.values()}) == len(STATUS)


def test_every_status_is_one_of_its_protocol_and_a_failure() -> None:
    for status in STATUS.values():
        assert status.grpc is not grpc.StatusCode.OK
        assert HTTPStatus(status.http) >= 400


def test_every_code_belongs_to_a_class_of_the_tree() -> None:
    assert {kind.code for kind in tree()} == set(ErrorCode)


@pytest.mark.parametrize("kind", list(tree()))
def test_every_class_survives_both_wires_as_itself_or_a_base_of_the_same_code(kind: type[NanofleetError]) -> None:
    status = STATUS[kind.code]
    for received in (error_from_grpc(status.grpc, "why"), error_from_http(status.http, "why")):
        assert isinstance(kind("why"), type(received))
        assert (received.code, received.retryable, str(received)) == (kind.code, kind.retryable, "why")


@pytest.mark.parametrize("kind", list(tree()))
def test_a_class_has_the_code_and_the_flag_of_its_base(kind: type[NanofleetError]) -> None:
    base = kind.__mro__[1]
    assert issubclass(base, NanofleetError)
    if base is not NanofleetError:
        assert (kind.code, kind.retryable) == (base.code, base.retryable)


def test_the_docstring_draws_every_class_of_the_tree() -> None:
    drawn = re.findall(r"─ (\w+)", errors.__doc__ or "")
    assert sorted(drawn) == sorted(kind.__name__ for kind in tree())


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (grpc.StatusCode.CANCELLED, Unavailable), (grpc.StatusCode.ABORTED, Unavailable),
        (grpc.StatusCode.UNKNOWN, InternalError),
        (grpc.StatusCode.UNIMPLEMENTED, InvalidRequest),
    ],
)  # fmt: skip
def test_a_grpc_status_that_only_others_send_has_a_meaning(status: grpc.StatusCode, kind: type[NanofleetError]) -> None:
    assert type(error_from_grpc(status, "")) is kind


@pytest.mark.parametrize(
    ("status", "kind"),
    [(405, InvalidRequest), (422, InvalidRequest), (520, Unavailable), (302, Unavailable)],
)
def test_an_http_status_that_only_others_send_has_a_meaning(status: int, kind: type[NanofleetError]) -> None:
    assert type(error_from_http(status, "")) is kind
