"""How checks are run: side by side, in order, within their time, none at the expense of another."""

import threading
import time

from core.doctor import Finding, Verdict, document, is_well, ok, problem, render, run_checks, skipped, warning
from core.errors import Unavailable


def failing() -> Finding:
    raise Unavailable("the broker is away")


def defective() -> Finding:
    raise ZeroDivisionError


def test_findings_come_in_the_order_of_the_checks() -> None:
    second_is_done = threading.Event()

    def first() -> Finding:
        assert second_is_done.wait(10)
        return ok("a", "late")

    def second() -> tuple[Finding, ...]:
        second_is_done.set()
        return ok("b", "one"), ok("b too", "two")

    assert [finding.check for finding in run_checks({"a": first, "b": second})] == ["a", "b", "b too"]


def test_a_check_that_fails_is_a_problem_and_the_others_are_run() -> None:
    findings = run_checks({"broker": failing, "disk": defective, "clock": lambda: ok("clock", "set")})

    assert [finding.verdict for finding in findings] == [Verdict.PROBLEM, Verdict.PROBLEM, Verdict.OK]
    assert findings[0].found == "the broker is away"
    assert "ZeroDivisionError" in findings[1].found


def test_a_check_that_hangs_is_a_problem_after_its_time() -> None:
    never = threading.Event()
    started_s = time.monotonic()
    try:
        findings = run_checks({"disk": lambda: ok("disk", str(never.wait(60)))}, timeout_s=0.2)
    finally:
        never.set()

    assert time.monotonic() - started_s < 10
    assert (findings[0].verdict, findings[0].found) == (Verdict.PROBLEM, "no answer within 0.2 s")


def test_only_a_problem_makes_it_unwell() -> None:
    others = [ok("a", ""), skipped("b", ""), warning("c", "", expected="", remedy="")]
    assert is_well(others)
    assert not is_well([*others, problem("d", "", expected="", remedy="")])


def test_findings_are_shown_with_what_was_expected_and_what_to_do() -> None:
    found = problem("port", "\x1b[2Jtaken", expected="a free one", remedy="stop it")
    text = "\n".join(render([found], is_coloured=False))
    assert "problem  port  ?[2Jtaken" in text
    assert "expected: a free one" in text
    assert "remedy: stop it" in text
    assert "\x1b[31mproblem" in "\n".join(render([found], is_coloured=True))
    assert document([found])["findings"][0]["verdict"] == "problem"
