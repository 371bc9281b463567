"""The soak's bookkeeping: what counts as lost, late, executed twice, and how fast memory grows."""

import pytest

from benchmarks.soak_record import GRACE_S, Asked, Record, Reply, slope_per_10_min

OK = Reply("200")


def asked(
    record: Record, name: str = "r", *, must_be_answered: bool = True, is_timed: bool = True, deadline_s: float = 5.0
) -> None:
    record.ask(name, Asked("v5", 0.0, deadline_s, must_be_answered=must_be_answered, is_timed=is_timed))


def judged(record: Record) -> dict[str, int]:
    record.judge(100.0, is_end=True)
    return dict(record.counts)


def test_a_request_without_an_answer_is_lost() -> None:
    record = Record()
    asked(record)
    counts = judged(record)
    assert (counts["lost"], counts["answered"], record.lost) == (1, 0, ["v5 r"])


@pytest.mark.parametrize("status", ["200", "429", "503"])
def test_a_refusal_is_an_answer(status: str) -> None:
    record = Record()
    asked(record)
    record.reply("r", Reply(status), now_s=1.0)
    assert "lost" not in judged(record)
    assert record.statuses == {status: 1}


@pytest.mark.parametrize(("begin_s", "end_s", "is_excused"), [(4.0, 9.0, True), (-3.0, 1.0, True), (5.5, 9.0, False)])
def test_a_loss_is_excused_by_an_outage_in_its_time_only(begin_s: float, end_s: float, is_excused: bool) -> None:
    record = Record()
    asked(record)
    record.begin_outage(begin_s)
    record.end_outage(end_s)
    counts = judged(record)
    assert (counts.get("excused", 0), counts.get("lost", 0)) == ((1, 0) if is_excused else (0, 1))


def test_an_outage_that_is_not_over_excuses_too() -> None:
    record = Record()
    asked(record)
    record.begin_outage(2.0)
    assert judged(record)["excused"] == 1


def test_what_may_be_dropped_is_not_lost() -> None:
    record = Record()
    asked(record, must_be_answered=False)
    assert "lost" not in judged(record)


def test_a_reply_after_the_deadline_is_late_and_apart_where_nothing_tells_the_time() -> None:
    record = Record()
    asked(record, "timed")
    asked(record, "untimed", is_timed=False)
    for name in ("timed", "untimed"):
        record.reply(name, OK, now_s=5.1)
    counts = judged(record)
    assert (counts["late"], counts["late_untimed"]) == (1, 1)


def test_a_verdict_that_was_promised_for_later_is_not_late_and_is_waited_for() -> None:
    record = Record()
    asked(record)
    record.reply("r", Reply("200", is_final=False, reason="heavy_unavailable"), now_s=1.0)
    record.judge(5.0 + 2 * GRACE_S)
    assert record.waiting_for_verdicts == 1
    record.reply("r", OK, now_s=90.0)
    counts = judged(record)
    assert (counts["deferred"], counts["verdicts"], counts["verdicts_missing"], counts["late"]) == (1, 1, 0, 0)


def test_a_promise_that_is_not_kept_shows() -> None:
    record = Record()
    asked(record)
    record.reply("r", Reply("200", is_final=False, reason="heavy_unavailable"), now_s=1.0)
    assert judged(record)["verdicts_missing"] == 1


def test_two_spans_under_one_request_are_two_executions() -> None:
    record = Record()
    asked(record, "once")
    asked(record, "twice")
    for name, spans in (("once", ("a", "a")), ("twice", ("a", "b"))):
        record.copied(name)
        for span in spans:
            record.reply(name, Reply("200", span=span), now_s=1.0)
    counts = judged(record)
    assert (counts["second_executions_traced"], counts["traced_copies"], counts["repeated_replies"]) == (1, 2, 2)


def test_what_is_over_is_forgotten_and_a_reply_to_it_a_stranger() -> None:
    record = Record()
    asked(record)
    record.reply("r", OK, now_s=1.0)
    record.judge(5.1 + GRACE_S)
    record.reply("r", OK, now_s=50.0)
    assert record.counts["strangers"] == 1


def test_the_slope_is_a_share_of_the_middle_in_ten_minutes_and_bears_outliers() -> None:
    growing = [(float(second), 100.0 + second / 60) for second in range(1200)]
    assert slope_per_10_min(growing) == pytest.approx(0.1 / 1.1, rel=0.02)
    spiked = [(second, 500.0 if second % 10 == 3 else 100.0) for second, _ in growing]
    assert slope_per_10_min(spiked) == pytest.approx(0.0, abs=1e-9)


def test_a_single_sample_has_no_slope() -> None:
    assert slope_per_10_min([(0.0, 100.0)]) == 0.0
