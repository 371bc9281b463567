"""The child: one question on standard input, one answer on standard output, then it is gone.

It is all that an agent ever loads of `tuf` and `cryptography`. Exit code 0 also for a no; anything else is a defect.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from tuf.ngclient import FetcherInterface

from core.errors import NanofleetError
from edge_agent.trust.admission import admit
from edge_agent.trust.fetchers import FromController, Pace
from edge_agent.trust.question import (
    MAX_QUESTION_BYTES,
    CatalogueSource,
    decode_question,
    encode_answer,
    encode_refusal,
)

# Chosen: a third of the share of a request beside it. It is half a second of work, and at 10 a busy machine took ten
# seconds over it (measured at a load of six per core).
_NICENESS = 5


def main() -> int:
    os.nice(_NICENESS)
    content = sys.stdin.buffer.read(MAX_QUESTION_BYTES + 1)
    sys.stdout.buffer.write(_answer(content, now=datetime.now(UTC)))
    sys.stdout.buffer.flush()
    return 0


def _answer(content: bytes, *, now: datetime) -> bytes:
    try:
        question = decode_question(content)
        source = question.source
        live = None if source is None else (lambda: _controller(source))
        return encode_answer(admit(question, now=now, live=live))
    except NanofleetError as error:
        return encode_refusal(error)


@contextmanager
def _controller(source: CatalogueSource) -> Iterator[FetcherInterface]:
    fetcher = FromController(source, pace=Pace())
    try:
        yield fetcher
    finally:
        fetcher.close()


if __name__ == "__main__":
    sys.exit(main())
