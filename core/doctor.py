"""What a doctor finds: checks that look at one thing each, run side by side, each within the time that it gets.

    checks (name → function) ─▶ run_checks ─▶ findings, in order ─▶ exit code

A check says what it found, what it expected and what to do. One that fails or hangs is a finding as well, and keeps no
other from its own. `core.machine_checks` has those that look at the machine.
"""

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, TypeAlias

from core.errors import NanofleetError

# Chosen: a broker or a controller that takes longer is no help to anybody either.
CHECK_TIMEOUT_S = 20.0


class Verdict(StrEnum):
    OK = "ok"
    WARNING = "warning"
    """It works, and may soon or under load not."""
    PROBLEM = "problem"
    SKIPPED = "skipped"
    """It could not be looked at; `found` says why."""


@dataclass(frozen=True, slots=True)
class Finding:
    check: str
    verdict: Verdict
    found: str
    expected: str = ""
    remedy: str = ""


# Of ECMA-48's "select graphic rendition".
_COLOURS = {Verdict.OK: "32", Verdict.WARNING: "33", Verdict.PROBLEM: "31", Verdict.SKIPPED: "2"}

Check: TypeAlias = Callable[[], Finding | Sequence[Finding]]


def ok(check: str, found: str) -> Finding:
    return Finding(check, Verdict.OK, found)


def skipped(check: str, reason: str) -> Finding:
    return Finding(check, Verdict.SKIPPED, reason)


def warning(check: str, found: str, *, expected: str, remedy: str) -> Finding:
    return Finding(check, Verdict.WARNING, found, expected, remedy)


def problem(check: str, found: str, *, expected: str, remedy: str) -> Finding:
    return Finding(check, Verdict.PROBLEM, found, expected, remedy)


def run_checks(checks: Mapping[str, Check], *, timeout_s: float = CHECK_TIMEOUT_S) -> list[Finding]:
    """Run all of them at once; return their findings in the order of `checks`, at the latest after `timeout_s`."""
    done: queue.SimpleQueue[tuple[str, Sequence[Finding]]] = queue.SimpleQueue()
    for name, check in checks.items():
        # A daemon: one that hangs in the kernel must not keep the process from its end.
        threading.Thread(target=lambda n=name, c=check: done.put((n, _outcome(n, c))), name=name, daemon=True).start()
    found: dict[str, Sequence[Finding]] = {}
    until_s = time.monotonic() + timeout_s
    while len(found) < len(checks) and (left_s := until_s - time.monotonic()) > 0:
        try:
            name, findings = done.get(timeout=left_s)
        except queue.Empty:
            break
        found[name] = findings
    return [finding for name in checks for finding in found.get(name, (_hung(name, timeout_s),))]


def is_well(findings: Sequence[Finding]) -> bool:
    return all(finding.verdict is not Verdict.PROBLEM for finding in findings)


def document(findings: Sequence[Finding]) -> dict[str, Any]:
    """Return the findings for JSON."""
    return {"is_well": is_well(findings), "findings": [asdict(finding) for finding in findings]}


def render(findings: Sequence[Finding], *, is_coloured: bool) -> list[str]:
    """Return lines for people; what peers said cannot control the terminal."""
    width = max(len(finding.check) for finding in findings)
    lines = []
    for finding in findings:
        word = finding.verdict.value.ljust(8)
        painted = f"\x1b[{_COLOURS[finding.verdict]}m{word}\x1b[0m" if is_coloured else word
        lines.append(f"{painted} {finding.check.ljust(width)}  {_printable(finding.found)}")
        for name, text in (("expected", finding.expected), ("remedy", finding.remedy)):
            if text:
                lines.append(f"{'':8} {'':{width}}  {name}: {_printable(text)}")
    return lines


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in text)


def _outcome(name: str, check: Check) -> Sequence[Finding]:
    try:
        found = check()
    except NanofleetError as error:
        return (problem(name, str(error), expected="an answer", remedy="see what was found"),)
    except Exception as error:
        # The root of this check's thread; the others must not suffer from a defect of one.
        return (
            problem(
                name,
                f"the check itself failed: {type(error).__name__}: {error}",
                expected="a finding",
                remedy="report it together with this line",
            ),
        )
    return (found,) if isinstance(found, Finding) else found


def _hung(name: str, timeout_s: float) -> Finding:
    return problem(
        name,
        f"no answer within {timeout_s:g} s",
        expected="an answer at once",
        remedy="look whether the disk, the network or the peer hangs",
    )
