"""The gate: verification in a short child process, so that this one never loads `tuf` or `cryptography`.

One verification at a time. A child that says too much or dies is a defect or an attack; what it was asked about is then
not admitted. One that does not start, takes too long or is killed says how busy the machine is: it is asked again.
"""

import asyncio
import logging
import signal
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.message import DecodeError

from core.digest import Digest
from core.errors import InternalError, InvalidRequest, Unavailable
from core.fleet_state import CatalogueVersions, DesiredState, SignedAssignment
from core.fleet_wire import decode_desired
from core.ids import AgentId
from edge_agent.trust.accepted import load_accepted
from edge_agent.trust.question import (
    MAX_ANSWER_BYTES,
    Answer,
    CatalogueSource,
    Question,
    decode_answer,
    encode_question,
)
from edge_agent.trust.terms import ManifestTerms
from protos.fleet.v1 import fleet_pb2 as pb

# Chosen: a few files over a bad mobile link, and a start of the interpreter on a small board.
VERIFICATION_TIMEOUT_S = 60.0
# Chosen: clocks without a good source wander by minutes; below this it is no alarm.
CLOCK_TOLERANCE_S = 300.0
# -P: the working directory may not shadow a module.
CHILD_COMMAND = (sys.executable, "-P", "-m", "edge_agent.trust")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Admitted:
    """A verified desired state, and what its new manifests have to fulfil."""

    desired: DesiredState
    allowed: Mapping[Digest, ManifestTerms]


class TrustGate:
    """Verifies assignments against the catalogue in `folder`; `source` says whom to ask for metadata."""

    def __init__(
        self,
        folder: Path,
        *,
        source: Callable[[], CatalogueSource | None],
        timeout_s: float = VERIFICATION_TIMEOUT_S,
        command: tuple[str, ...] = CHILD_COMMAND,
    ) -> None:
        self._folder = folder
        self._source = source
        self._timeout_s = timeout_s
        self._command = command
        # One child at a time: it is the only writer of the folder.
        self._turn = asyncio.Lock()
        self.clock_behind_s = 0.0

    @property
    def clock_problem(self) -> str:
        """How this machine's clock contradicted the catalogue when it was last asked; "": it did not."""
        if self.clock_behind_s <= CLOCK_TOLERANCE_S:
            return ""
        return f"at least {self.clock_behind_s / 3600:.1f} h behind what the catalogue says has passed; set the clock"

    async def admit(
        self, signed: SignedAssignment, *, agent_id: AgentId, tags: Collection[str], running: Collection[Digest]
    ) -> Admitted:
        """Return what `signed` asks for, once everything about it is verified; cancelling stops the child.

        Slots whose manifests are `running` need no catalogue any more.

        Raises:
            Untrusted: the assignment or the catalogue does not hold; asking again changes nothing.
            Unavailable: current metadata could not be had; ask again later.
            DiskFull: there is no room to keep what was verified.
            InvalidRequest: the assignment makes no sense.
        """
        desired = decoded(signed)
        question = Question(self._folder, agent_id, signed, frozenset(running), self._source())
        async with self._turn:
            answer = await self._ask(question)
        self._note_clock(answer.clock_behind_s)
        allowed = {
            digest: ManifestTerms(statement.length_bytes, statement.release_floor, frozenset(tags))
            for digest, statement in answer.allowed.items()
        }
        return Admitted(desired, allowed)

    def versions(self) -> CatalogueVersions:
        """Return which metadata is held, for the hello."""
        return load_accepted(self._folder).versions

    async def _ask(self, question: Question) -> Answer:
        child = await self._started()
        try:
            async with asyncio.timeout(self._timeout_s):
                said = await _said(child, encode_question(question))
                code = await child.wait()
        except TimeoutError:
            raise Unavailable(f"the verification took longer than {self._timeout_s:g} s; it is tried again") from None
        finally:
            await _ended(child)
        if code == -signal.SIGKILL:
            # Nobody here did: the machine ran out of memory.
            raise Unavailable("the verification was killed, as for want of memory; it is tried again")
        if code != 0:
            raise InternalError(f"the verification ended with code {code}; see the agent's log")
        return decode_answer(said)

    async def _started(self) -> asyncio.subprocess.Process:
        try:
            return await asyncio.create_subprocess_exec(
                *self._command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
            )
        except OSError as error:
            raise Unavailable(
                f"the verification did not start: {error.strerror or error}; it is tried again"
            ) from error

    def _note_clock(self, behind_s: float) -> None:
        was_alarmed = self.clock_behind_s > CLOCK_TOLERANCE_S
        self.clock_behind_s = behind_s
        if behind_s > CLOCK_TOLERANCE_S and not was_alarmed:
            _log.warning("the clock lies before what has certainly passed", extra={"behind_s": round(behind_s)})


def decoded(signed: SignedAssignment) -> DesiredState:
    """Return what `signed` claims; nothing of it is verified."""
    try:
        return decode_desired(pb.DesiredState.FromString(signed.payload))
    except DecodeError as error:
        raise InvalidRequest(f"assignment: expected a desired state, got {error}") from error


async def _said(child: asyncio.subprocess.Process, question: bytes) -> bytes:
    assert child.stdin is not None
    assert child.stdout is not None
    telling = asyncio.create_task(_tell(child.stdin, question), name="verification question")
    try:
        return await _bounded(child.stdout)
    finally:
        telling.cancel()
        await asyncio.wait([telling])


async def _tell(stdin: asyncio.StreamWriter, question: bytes) -> None:
    try:
        stdin.write(question)
        await stdin.drain()
        stdin.close()
        await stdin.wait_closed()
    except (BrokenPipeError, ConnectionResetError):
        # It ended early; its exit code says why.
        return


async def _bounded(stdout: asyncio.StreamReader) -> bytes:
    said = bytearray()
    while block := await stdout.read(1 << 16):
        said += block
        if len(said) > MAX_ANSWER_BYTES:
            raise InternalError(f"the verification: expected at most {MAX_ANSWER_BYTES} bytes, got more")
    return bytes(said)


async def _ended(child: asyncio.subprocess.Process) -> None:
    """Leave no child behind, however the verification ended."""
    if child.returncode is not None:
        return
    child.kill()
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.close()
    # `wait` returns when the pipes are closed too, and a full one is closed only after it was read to its end.
    while await child.stdout.read(1 << 16):
        pass
    await child.wait()
