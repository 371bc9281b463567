"""Code that only the start needed: what is taken out of memory, and that everything works on."""

import subprocess
import sys
from pathlib import Path

import pytest

from edge_agent.health import code_pages
from edge_agent.health.code_pages import unmodified_code

PYTHON = "00400000-00402000 r-xp 00001000 fe:00 1234                     /usr/bin/python3.11"


def entry(head: str | bytes, *amounts: str) -> bytes:
    """Return one mapping as proc_pid_smaps(5) tells of it."""
    first = head.encode() if isinstance(head, str) else head
    return b"\n".join([first, b"Size:                  8 kB", *map(str.encode, amounts), b"VmFlags: rd ex mr", b""])


def amount(name: str, kb: int) -> str:
    return f"{name}:".ljust(16) + f"{kb:8} kB"


UNWRITTEN = amount("Anonymous", 0), amount("Swap", 0)


@pytest.mark.parametrize(
    ("head", "amounts", "is_found"),
    [
        (PYTHON, UNWRITTEN, True),
        ("00400000-00402000 r-xp 00001000 fe:00 1234      /lib/with a space.so", UNWRITTEN, True),
        (b"00400000-00402000 r-xp 00001000 fe:00 1234      /lib/ger\xe4t.so", UNWRITTEN, True),
        (PYTHON, (amount("Anonymous", 4), amount("Swap", 0)), False),
        (PYTHON, (amount("Anonymous", 0), amount("Swap", 4)), False),
        (PYTHON, (amount("Anonymous", 0),), False),
        (PYTHON.replace("r-xp", "rw-p"), UNWRITTEN, False),
        (PYTHON.replace("r-xp", "r-xs"), UNWRITTEN, False),
        ("00400000-00402000 r-xp 00000000 00:00 0", UNWRITTEN, False),
        ("00400000-00402000 r-xp 00000000 00:00 0         [vdso]", UNWRITTEN, False),
    ],
)
def test_private_code_of_files_that_was_never_written_is_found(
    head: str | bytes, amounts: tuple[str, ...], is_found: bool
) -> None:
    other = entry("00500000-00501000 rw-p 00003000 fe:00 1234 /usr/bin/python3.11", *UNWRITTEN)
    found = list(unmodified_code(other + entry(head, *amounts) + other))
    assert found == ([(0x400000, 0x2000)] if is_found else [])


def test_a_kernel_that_does_not_tell_costs_only_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_pages, "_SMAPS", tmp_path / "smaps")
    assert code_pages.release() == 0


async def released_after(monkeypatch: pytest.MonkeyPatch, *sizes_mb: float, is_idle: bool = True) -> int:
    """Return how often code was released while the process held these sizes, one after another."""
    sizes, releases = iter([round(size * (1 << 20)) for size in sizes_mb]), 0

    def note_release() -> int:
        nonlocal releases
        releases += 1
        return 0

    monkeypatch.setattr(code_pages, "LOOK_INTERVAL_S", 0.0)
    monkeypatch.setattr(code_pages, "resident_bytes", lambda: next(sizes))
    monkeypatch.setattr(code_pages, "release", note_release)
    with pytest.raises(RuntimeError):
        await code_pages.keep_released(lambda: is_idle)
    return releases


async def test_code_that_came_later_is_released_once_it_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert await released_after(monkeypatch, 20, 20.5, 25, 20, 20.5) == 1


async def test_no_request_waits_for_a_release(monkeypatch: pytest.MonkeyPatch) -> None:
    assert await released_after(monkeypatch, 20, 25, 25, is_idle=False) == 0


def test_the_code_in_memory_is_known() -> None:
    assert 1 << 20 < code_pages.resident_bytes() < 1 << 30


SCRIPT = """
import re
from pathlib import Path
import numpy
from edge_agent.health import code_pages

def mapped_kb():
    return int(re.search(r"RssFile:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

before_kb = mapped_kb()
released_bytes = code_pages.release()
after_kb = mapped_kb()
assert numpy.linalg.det(numpy.eye(8)) == 1.0
print(before_kb, after_kb, released_bytes)
"""


def test_code_is_released_and_comes_back_when_it_is_needed() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    before_kb, after_kb, released_bytes = map(int, done.stdout.split())
    # Code alone is taken out: constants and tables stay.
    assert after_kb < before_kb * 0.8
    assert released_bytes > 0
