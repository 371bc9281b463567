"""The limit on open files, looked at in a process of its own: a test must not change that of its siblings."""

import subprocess
import sys

import pytest

PROGRAM = """
import logging, resource, sys
from controller.api.open_files import allow_many
soft, hard = int(sys.argv[1]), int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
logging.basicConfig(format="%(levelname)s")
allow_many()
print(*resource.getrlimit(resource.RLIMIT_NOFILE))
"""


@pytest.mark.parametrize(
    ("soft", "hard", "expected", "warned"), [(1024, 18_000, "18000 18000", False), (512, 4096, "4096 4096", True)]
)
def test_the_limit_goes_as_high_as_the_system_lets_us(soft: int, hard: int, expected: str, warned: bool) -> None:
    words = [sys.executable, "-c", PROGRAM, str(soft), str(hard)]

    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=30)

    assert (done.stdout.strip(), "WARNING" in done.stderr) == (expected, warned)
