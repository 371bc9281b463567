"""Code that only the start needed: what is taken out of memory, and that everything works on."""

import subprocess
import sys

from edge_agent.health.code_pages import unmodified_code

SMAPS = """\
00400000-00402000 r-xp 00001000 fe:00 1234                               /usr/bin/python3.11
Size:                  8 kB
Rss:                   8 kB
Anonymous:             0 kB
VmFlags: rd ex mr mw me
00500000-00501000 rw-p 00003000 fe:00 1234                               /usr/bin/python3.11
Anonymous:             0 kB
7f0000000000-7f0000003000 r-xp 00000000 fe:00 5678                       /usr/lib/with a space.so
Anonymous:             4 kB
7f0000010000-7f0000014000 r-xp 00000000 fe:00 5678                       /usr/lib/with a space.so
Anonymous:             0 kB
7f0000020000-7f0000021000 r-xp 00000000 00:00 0
Anonymous:             0 kB
7f0000030000-7f0000031000 r-xp 00000000 00:00 0                          [vdso]
Anonymous:             0 kB
7f0000040000-7f0000041000 r-xs 00000000 fe:00 9999                       /shared
Anonymous:             0 kB
"""

SCRIPT = """
import re, sys
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


def test_private_code_of_files_that_was_never_written_is_found() -> None:
    assert list(unmodified_code(SMAPS)) == [(0x400000, 0x2000), (0x7F0000010000, 0x4000)]


def test_code_is_released_and_comes_back_when_it_is_needed() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    before_kb, after_kb, released_bytes = map(int, done.stdout.split())
    # Code alone is taken out: constants and tables stay.
    assert after_kb < before_kb * 0.8
    assert released_bytes > 0
