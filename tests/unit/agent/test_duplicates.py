"""One execution per request: whatever comes again finds its reply, within bounds that are shared fairly."""

from collections.abc import Callable, Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from core.errors import Conflict
from edge_agent.front.mqtt.duplicates import OVERHEAD_BYTES, Duplicates, Execution
from edge_agent.front.mqtt.wire import Reply


def reply(payload: bytes = b"{}") -> Reply:
    return Reply("t", payload, 1, b"", deadline_s=10.0)


def duplicates(*, requests: int = 8, size_bytes: int = 1 << 20, note: Callable[[], None] = lambda: None) -> Duplicates:
    return Duplicates(max_requests=requests, max_bytes=size_bytes, note_forgotten=note)


def begun(
    memory: Duplicates,
    correlation: bytes = b"r1",
    *,
    client: str = "camera-1",
    content: int = 1,
    deadline_s: float = 10.0,
    now_s: float = 0.0,
) -> Execution | Sequence[Reply]:
    return memory.begin(client, correlation, content=content, deadline_s=deadline_s, now_s=now_s)


def run(memory: Duplicates, correlation: bytes = b"r1", *, client: str = "camera-1", payload: bytes = b"{}") -> None:
    execution = begun(memory, correlation, client=client)
    assert isinstance(execution, Execution)
    memory.finish(execution, reply(payload))


def is_known(memory: Duplicates, correlation: bytes, *, client: str = "camera-1") -> bool:
    return not isinstance(begun(memory, correlation, client=client), Execution)


def test_a_request_is_run_once_and_while_it_is_under_way_it_has_no_other_answer() -> None:
    memory = duplicates()
    assert isinstance(begun(memory), Execution)
    assert begun(memory, now_s=1) == []


def test_a_request_that_comes_again_finds_its_reply() -> None:
    memory = duplicates()
    run(memory)
    assert begun(memory, now_s=2) == [reply()]


def test_requests_of_two_clients_with_the_same_correlation_data_are_two() -> None:
    memory = duplicates()
    run(memory, client="camera-1")
    assert isinstance(begun(memory, client="camera-2"), Execution)


def test_other_content_under_a_correlation_that_is_taken_is_a_conflict_and_changes_nothing() -> None:
    memory = duplicates()
    run(memory)
    with pytest.raises(Conflict):
        begun(memory, content=2)
    assert begun(memory) == [reply()]


def test_other_content_under_a_correlation_that_is_over_is_a_request_like_any() -> None:
    memory = duplicates()
    run(memory)
    assert isinstance(begun(memory, content=2, deadline_s=20, now_s=11), Execution)


def test_after_its_deadline_a_request_is_forgotten() -> None:
    memory = duplicates()
    run(memory)
    assert isinstance(begun(memory, deadline_s=20, now_s=11), Execution)


def test_what_was_refused_only_for_now_may_be_run_again() -> None:
    memory = duplicates()
    execution = begun(memory)
    assert isinstance(execution, Execution)
    memory.forget(execution)
    assert isinstance(begun(memory, now_s=1), Execution)


def test_a_run_that_outlived_its_deadline_does_not_answer_the_request_that_came_after_it() -> None:
    memory = duplicates()
    late = begun(memory, deadline_s=1)
    again = begun(memory, deadline_s=20, now_s=2)
    assert isinstance(late, Execution)
    assert isinstance(again, Execution)
    memory.finish(late, reply(b"old"))
    assert begun(memory, now_s=3) == []
    memory.finish(again, reply(b"new"))
    memory.forget(late)
    assert begun(memory, now_s=3) == [reply(b"new")]


def started(memory: Duplicates) -> Execution:
    execution = begun(memory)
    assert isinstance(execution, Execution)
    return execution


def test_a_request_with_a_provisional_reply_finds_that_and_then_both() -> None:
    memory = duplicates()
    execution = started(memory)
    memory.note_provisional(execution, reply(b"first"), is_under_way=True)
    assert begun(memory) == [reply(b"first")]
    memory.finish(execution, reply(b"last"))
    assert begun(memory) == [reply(b"first"), reply(b"last")]
    assert memory.size_bytes == OVERHEAD_BYTES + reply(b"first").size_bytes + reply(b"last").size_bytes


def test_a_second_provisional_reply_takes_the_place_of_the_first() -> None:
    memory = duplicates()
    execution = started(memory)
    memory.note_provisional(execution, reply(b"first"), is_under_way=True)
    memory.note_provisional(execution, reply(b"second"), is_under_way=False)
    assert begun(memory) == [reply(b"second")]
    assert memory.size_bytes == OVERHEAD_BYTES + reply(b"second").size_bytes


def test_after_the_final_reply_nothing_is_provisional_or_final() -> None:
    memory = duplicates()
    execution = started(memory)
    memory.finish(execution, reply(b"last"))
    memory.note_provisional(execution, reply(b"stray"), is_under_way=True)
    memory.finish(execution, reply(b"second"))
    assert begun(memory) == [reply(b"last")]


def test_a_late_verdict_belongs_to_the_request_that_was_told_of_it() -> None:
    memory = duplicates()
    memory.follow_up("camera-1", b"r1", reply(b"of nobody"))
    execution = started(memory)
    memory.follow_up("camera-1", b"r1", reply(b"of another"))
    assert begun(memory) == []
    memory.note_provisional(execution, reply(b"first"), is_under_way=False)
    memory.follow_up("camera-1", b"r1", reply(b"last"))
    assert begun(memory) == [reply(b"first"), reply(b"last")]


def test_a_request_that_waits_for_the_heavy_tier_elsewhere_may_be_given_up() -> None:
    memory = duplicates(requests=2)
    memory.note_provisional(started(memory), reply(b"first"), is_under_way=False)
    for number in range(2):
        run(memory, b"%d" % number)
    assert isinstance(begun(memory), Execution)


def test_the_number_of_remembered_requests_is_bounded_and_the_oldest_go_first_and_are_counted() -> None:
    forgotten: list[None] = []
    memory = duplicates(requests=2, note=lambda: forgotten.append(None))
    for number in range(5):
        run(memory, b"%d" % number)
    assert (len(memory), len(forgotten)) == (2, 3)
    assert [is_known(memory, b"%d" % number) for number in (4, 3, 2)] == [True, True, False]


def test_the_bytes_of_what_is_remembered_are_bounded() -> None:
    memory = duplicates(size_bytes=3 * OVERHEAD_BYTES)
    for number in range(4):
        run(memory, b"%d" % number, payload=b"x" * 400)
    assert memory.size_bytes <= 3 * OVERHEAD_BYTES
    assert is_known(memory, b"3")


def test_what_is_under_way_is_never_given_up() -> None:
    memory = duplicates(requests=2)
    begun(memory, b"long")
    for number in range(5):
        run(memory, b"%d" % number)
    assert begun(memory, b"long") == []


def test_one_client_cannot_push_out_what_others_need() -> None:
    memory = duplicates(requests=8)
    for number in range(2):
        run(memory, b"%d" % number, client="meter")
    for number in range(100):
        run(memory, b"%d" % number, client="flood")
    assert [is_known(memory, b"%d" % number, client="meter") for number in range(2)] == [True, True]


def test_the_large_replies_of_one_client_do_not_push_out_those_of_others() -> None:
    memory = duplicates(size_bytes=10 * OVERHEAD_BYTES)
    run(memory, client="meter")
    for number in range(100):
        run(memory, b"%d" % number, client="flood", payload=b"x" * 3000)
    assert is_known(memory, b"r1", client="meter")


def test_a_client_that_filled_the_memory_alone_makes_room_for_one_that_comes_later() -> None:
    memory = duplicates(requests=8)
    for number in range(8):
        run(memory, b"%d" % number, client="first")
    for number in range(4):
        run(memory, b"%d" % number, client="second")
    assert [is_known(memory, b"%d" % number, client="second") for number in range(4)] == [True] * 4


def test_expired_requests_of_clients_that_left_make_room_by_themselves() -> None:
    forgotten: list[None] = []
    memory = duplicates(note=lambda: forgotten.append(None))
    for number in range(4):
        begun(memory, b"%d" % number, client=f"c{number}", deadline_s=1)
    begun(memory, b"new", now_s=5)
    assert (len(memory), forgotten) == (1, [])


class OneExecution(RuleBasedStateMachine):
    """Devices send, send again and change their minds; `owed` is what must not be run once more."""

    def __init__(self) -> None:
        super().__init__()
        self.forgotten = self.run_again = 0
        self.memory = duplicates(requests=6, size_bytes=8 * OVERHEAD_BYTES, note=self.count)
        self.now_s = 0.0
        # By client and correlation: deadline, content and the replies so far.
        self.owed: dict[tuple[str, bytes], tuple[float, int, list[Reply]]] = {}
        self.running: dict[tuple[str, bytes], Execution] = {}

    def count(self) -> None:
        self.forgotten += 1

    @rule(
        client=st.sampled_from("abc"),
        correlation=st.sampled_from([b"1", b"2", b"3"]),
        content=st.sampled_from([1, 2]),
        lasts_s=st.sampled_from([0.5, 3.0, 60.0]),
    )
    def arrive(self, client: str, correlation: bytes, content: int, lasts_s: float) -> None:
        key = (client, correlation)
        deadline_s, known_content, replies = self.owed.get(key, (0.0, 0, []))
        forgotten = self.forgotten
        try:
            seen = begun(
                self.memory,
                correlation,
                client=client,
                content=content,
                deadline_s=self.now_s + lasts_s,
                now_s=self.now_s,
            )
        except Conflict:
            assert deadline_s > self.now_s
            assert known_content != content
            return
        if isinstance(seen, Execution):
            if deadline_s > self.now_s:
                # A second execution: only of what was answered, and only if the bound was counted.
                assert replies != []
                assert key not in self.running
                self.run_again += 1
                assert self.run_again <= self.forgotten
            self.owed[key] = (self.now_s + lasts_s, content, [])
            self.running[key] = seen
        else:
            assert (deadline_s > self.now_s, known_content, replies) == (True, content, seen)
            assert self.forgotten == forgotten

    @precondition(lambda self: self.running)
    @rule(data=st.data(), size_bytes=st.sampled_from([10, 500, 2000]))
    def answer(self, data: st.DataObject, size_bytes: int) -> None:
        key = data.draw(st.sampled_from(sorted(self.running)))
        made = reply(bytes(size_bytes))
        self.memory.finish(self.running.pop(key), made)
        self.owed[key][2].append(made)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), size_bytes=st.sampled_from([10, 500, 2000]))
    def answer_provisionally(self, data: st.DataObject, size_bytes: int) -> None:
        key = data.draw(st.sampled_from(sorted(self.running)))
        made = reply(bytes(size_bytes))
        self.memory.note_provisional(self.running[key], made, is_under_way=True)
        self.owed[key][2][:] = [made]

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def refuse_for_now(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.running)))
        self.memory.forget(self.running.pop(key))
        del self.owed[key]

    @rule(seconds=st.sampled_from([0.2, 1.0, 5.0]))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    @invariant()
    def beside_what_is_under_way_the_bounds_hold(self) -> None:
        assert len(self.memory) <= 6 + len(self.running)
        under_way = sum(execution.size_bytes for execution in self.running.values())
        assert len(self.memory) * OVERHEAD_BYTES <= self.memory.size_bytes <= 8 * OVERHEAD_BYTES + under_way


TestOneExecution = OneExecution.TestCase
TestOneExecution.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
