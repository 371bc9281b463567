"""One execution per request: what the broker delivers again finds its reply, within bounds."""

from edge_agent.front.mqtt.duplicates import Duplicates, Progress
from edge_agent.front.mqtt.wire import Reply

KEY = ("camera-1", b"r1")


def reply(payload: bytes = b"{}") -> Reply:
    return Reply("t", payload, 1, b"", deadline_s=10.0)


def test_a_request_is_fresh_once_and_then_in_flight() -> None:
    duplicates = Duplicates(max_entries=8, max_bytes=1000)
    assert duplicates.begin(KEY, deadline_s=10, now_s=0) is Progress.FRESH
    assert duplicates.begin(KEY, deadline_s=10, now_s=1) is Progress.IN_FLIGHT


def test_a_request_that_comes_again_finds_its_reply() -> None:
    duplicates = Duplicates(max_entries=8, max_bytes=1000)
    duplicates.begin(KEY, deadline_s=10, now_s=0)
    duplicates.finish(KEY, reply(), now_s=1)
    assert duplicates.begin(KEY, deadline_s=10, now_s=2) == [reply()]


def test_requests_of_two_clients_with_the_same_correlation_data_are_two() -> None:
    duplicates = Duplicates(max_entries=8, max_bytes=1000)
    duplicates.begin(("camera-1", b"1"), deadline_s=10, now_s=0)
    assert duplicates.begin(("camera-2", b"1"), deadline_s=10, now_s=0) is Progress.FRESH


def test_after_its_deadline_a_request_is_forgotten() -> None:
    duplicates = Duplicates(max_entries=8, max_bytes=1000)
    duplicates.begin(KEY, deadline_s=10, now_s=0)
    duplicates.finish(KEY, reply(), now_s=1)
    assert duplicates.begin(KEY, deadline_s=20, now_s=11) is Progress.FRESH


def test_what_was_refused_only_for_now_may_be_run_again() -> None:
    duplicates = Duplicates(max_entries=8, max_bytes=1000)
    duplicates.begin(KEY, deadline_s=10, now_s=0)
    duplicates.forget(KEY)
    assert duplicates.begin(KEY, deadline_s=10, now_s=1) is Progress.FRESH


def test_the_number_of_remembered_requests_is_bounded_and_the_oldest_go_first() -> None:
    duplicates = Duplicates(max_entries=2, max_bytes=1000)
    for number in range(5):
        duplicates.begin(("c", b"%d" % number), deadline_s=10, now_s=0)
    assert len(duplicates) == 2
    assert duplicates.begin(("c", b"4"), deadline_s=10, now_s=0) is Progress.IN_FLIGHT
    assert duplicates.begin(("c", b"0"), deadline_s=10, now_s=0) is Progress.FRESH


def test_the_bytes_of_stored_replies_are_bounded() -> None:
    duplicates = Duplicates(max_entries=8, max_bytes=250)
    for number in range(4):
        key = ("c", b"%d" % number)
        duplicates.begin(key, deadline_s=10, now_s=0)
        duplicates.finish(key, reply(b"x" * 100), now_s=0)
    assert duplicates.begin(("c", b"3"), deadline_s=10, now_s=0) == [reply(b"x" * 100)]
    assert duplicates.begin(("c", b"0"), deadline_s=10, now_s=0) is Progress.FRESH


def test_expired_requests_make_room_by_themselves() -> None:
    duplicates = Duplicates(max_entries=8, max_bytes=1000)
    for number in range(4):
        duplicates.begin(("c", b"%d" % number), deadline_s=1, now_s=0)
    duplicates.begin(("c", b"new"), deadline_s=10, now_s=5)
    assert len(duplicates) == 1


def test_a_request_with_a_provisional_reply_finds_that_and_then_both() -> None:
    duplicates = Duplicates(max_entries=8, max_bytes=1000)
    duplicates.begin(KEY, deadline_s=10, now_s=0)
    duplicates.note_provisional(KEY, reply(b"first"), now_s=1)
    assert duplicates.begin(KEY, deadline_s=10, now_s=2) == [reply(b"first")]
    duplicates.finish(KEY, reply(b"last"), now_s=3)
    assert duplicates.begin(KEY, deadline_s=10, now_s=4) == [reply(b"first"), reply(b"last")]


def test_a_second_provisional_reply_takes_the_place_of_the_first() -> None:
    duplicates = Duplicates(max_entries=8, max_bytes=1000)
    duplicates.begin(KEY, deadline_s=10, now_s=0)
    duplicates.note_provisional(KEY, reply(b"first"), now_s=1)
    duplicates.note_provisional(KEY, reply(b"second"), now_s=1)
    assert duplicates.begin(KEY, deadline_s=10, now_s=2) == [reply(b"second")]


def test_after_the_final_reply_nothing_is_provisional() -> None:
    duplicates = Duplicates(max_entries=8, max_bytes=1000)
    duplicates.begin(KEY, deadline_s=10, now_s=0)
    duplicates.finish(KEY, reply(b"last"), now_s=1)
    duplicates.note_provisional(KEY, reply(b"stray"), now_s=1)
    assert duplicates.begin(KEY, deadline_s=10, now_s=2) == [reply(b"last")]


def test_a_late_verdict_belongs_to_the_request_that_was_told_of_it() -> None:
    duplicates = Duplicates(max_entries=8, max_bytes=1000)
    duplicates.begin(KEY, deadline_s=10, now_s=0)
    duplicates.follow_up(KEY, reply(b"of another"), now_s=1)
    assert duplicates.begin(KEY, deadline_s=10, now_s=2) is Progress.IN_FLIGHT
    duplicates.note_provisional(KEY, reply(b"first"), now_s=3)
    duplicates.follow_up(KEY, reply(b"last"), now_s=4)
    assert duplicates.begin(KEY, deadline_s=10, now_s=5) == [reply(b"first"), reply(b"last")]


def test_provisional_replies_count_towards_the_bytes_and_free_them_again() -> None:
    duplicates = Duplicates(max_entries=8, max_bytes=250)
    duplicates.begin(KEY, deadline_s=10, now_s=0)
    for _ in range(10):
        duplicates.note_provisional(KEY, reply(b"x" * 100), now_s=0)
    duplicates.finish(KEY, reply(b"y" * 100), now_s=0)
    assert duplicates.begin(KEY, deadline_s=10, now_s=1) == [reply(b"x" * 100), reply(b"y" * 100)]
    duplicates.begin(("camera-2", b"1"), deadline_s=10, now_s=1)
    duplicates.finish(("camera-2", b"1"), reply(b"z" * 100), now_s=1)
    assert duplicates.begin(KEY, deadline_s=10, now_s=1) is Progress.FRESH
    assert duplicates.begin(("camera-2", b"1"), deadline_s=10, now_s=1) == [reply(b"z" * 100)]
