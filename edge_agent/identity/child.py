"""Asking the child process that does cryptography (`edge_agent.identity.__main__`): started, asked once, gone."""

import asyncio
import sys
from collections.abc import Mapping
from typing import Protocol

import orjson

from core.errors import InternalError, Unavailable, Untrusted

# Chosen: 0.2 s on a workstation, several seconds on a small board that is busy.
CHILD_TIMEOUT_S = 60.0
# Derived: the answer is a key, a request and a signature.
_MAX_ANSWER_BYTES = 64 << 10
# Of `__main__`, which is not imported: it brings the library.
_ANSWER, _REFUSAL = 0, 3


class Child(Protocol):
    """What does cryptography: `ask_child`."""

    async def __call__(self, command: str, body: Mapping[str, str], /) -> dict[str, str]: ...


async def ask_child(command: str, body: Mapping[str, str], *, timeout_s: float = CHILD_TIMEOUT_S) -> dict[str, str]:
    """Return the child's answer to `command`.

    Raises:
        Untrusted: it refuses; the message says why.
        Unavailable: it could not be started, or took too long.
        InternalError: it failed otherwise; its words are on standard error.
    """
    try:
        process = await asyncio.create_subprocess_exec(
            # -P: the working directory may not shadow a module.
            *(sys.executable, "-P", "-m", "edge_agent.identity", command),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
    except OSError as error:
        raise Unavailable(f"identity: the child process did not start: {error.strerror}") from error
    try:
        async with asyncio.timeout(timeout_s):
            content, _ = await process.communicate(orjson.dumps(dict(body)))
    except TimeoutError:
        raise Unavailable(f"identity: expected the child's answer within {timeout_s:g} s, got none") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return _answer(command, process.returncode, content)


def _answer(command: str, code: int | None, content: bytes) -> dict[str, str]:
    if code not in (_ANSWER, _REFUSAL) or len(content) > _MAX_ANSWER_BYTES:
        raise InternalError(f"identity: expected an answer to {command}, the child ended with code {code}")
    answer: dict[str, str] = orjson.loads(content)
    if code == _REFUSAL:
        raise Untrusted(answer["refusal"])
    return answer
