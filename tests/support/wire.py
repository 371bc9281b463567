"""What crosses the loopback device, taken with tcpdump and put together again as TCP streams and TLS records.

    with recorded(tmp_path, ports=[7443]) as recording:
        ...                                # connections to these ports
        recording.say(b"word")             # and to one of our own, without TLS
    for stream in recording.streams(7443): # as they were: both directions, in order
        stream.client_hello()

Needs root. Nothing here decrypts: whoever finds a word here, found it in clear.
"""

import os
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.mosquitto import MissingProgram, program_path

START_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 10.0
# Chosen: many times what a test sends, so that the kernel drops nothing on a busy machine.
BUFFER_KIB = 32 << 10
FLUSH_TIMEOUT_S = 10.0
END_BYTES = 32

_PCAP_HEADER_BYTES, _PACKET_HEADER_BYTES, _ETHERNET_BYTES, _IPV6_BYTES = 24, 16, 14, 40

CHANGE_CIPHER_SPEC, ALERT, HANDSHAKE, APPLICATION_DATA = 20, 21, 22, 23
CLIENT_HELLO, SERVER_HELLO = 1, 2
SUPPORTED_VERSIONS = 43
TLS_1_3 = 0x0304


@dataclass(frozen=True, slots=True)
class Record:
    """One TLS record as it stands on the wire."""

    kind: int
    content: bytes


@dataclass(frozen=True, slots=True)
class Stream:
    """One TCP connection to a recorded port: what the client sent, and what it was sent."""

    sent: bytes
    answered: bytes

    def client_hello(self) -> bytes:
        """Return the handshake message that the client begins with; it is no TLS client if there is none."""
        return _hello(self.sent, CLIENT_HELLO)

    def negotiated_version(self) -> int:
        """Return the protocol version that the server has chosen (RFC 8446, 4.2.1)."""
        hello = _hello(self.answered, SERVER_HELLO)
        # Type, length, legacy version, random; then the session id by its length, a cipher suite, a compression.
        position = 4 + 2 + 32
        position += 1 + hello[position] + 2 + 1
        end = position + 2 + int.from_bytes(hello[position : position + 2])
        position += 2
        while position < end:
            kind, length = struct.unpack_from("!HH", hello, position)
            if kind == SUPPORTED_VERSIONS:
                return int.from_bytes(hello[position + 4 : position + 4 + length])
            position += 4 + length
        return int.from_bytes(hello[4:6])


class Recording:
    """What was recorded in `path`; `speaker` is a connection without TLS that is recorded as well."""

    def __init__(self, path: Path, speaker: socket.socket, hearer: socket.socket) -> None:
        self._path = path
        self._speaker = speaker
        self._hearer = hearer
        self.spoken_port: int = hearer.getsockname()[1]

    def say(self, word: bytes) -> None:
        """Send a word in clear."""
        self._speaker.sendall(word)
        assert self._hearer.recv(len(word), socket.MSG_WAITALL) == word

    def flush(self) -> None:
        """Wait until everything up to now is on disk: the kernel hands over what it captured a second late."""
        end, give_up_s = os.urandom(END_BYTES), time.monotonic() + FLUSH_TIMEOUT_S
        self.say(end)
        while end not in self.raw():
            assert time.monotonic() < give_up_s, "expected the last word in the capture"
            time.sleep(0.05)

    def raw(self) -> bytes:
        """Return the whole capture, headers and all."""
        return self._path.read_bytes()

    def streams(self, port: int) -> list[Stream]:
        """Return every connection to a port in which the client sent something."""
        directions: dict[tuple[bytes, int, bytes, int], dict[int, bytes]] = {}
        for source, destination, sequence, payload in _segments(self.raw()):
            segments = directions.setdefault((*source, *destination), {})
            # A segment that is sent again may be longer than before, never other.
            segments[sequence] = max(segments.get(sequence, b""), payload, key=len)
        return [
            Stream(_joined(segments), _joined(directions.get((*key[2:], *key[:2]), {})))
            for key, segments in directions.items()
            if key[3] == port
        ]


def require_recording() -> None:
    """Raise MissingProgram unless this process may record what crosses the loopback device."""
    program_path("tcpdump")
    if os.geteuid() != 0:
        raise MissingProgram("recording the loopback device with tcpdump needs root")


@contextmanager
def recorded(folder: Path, *, ports: Sequence[int]) -> Iterator[Recording]:
    """Record TCP from and to `ports`; after the block the recording is whole.

    Raises:
        MissingProgram: this process may not record.
    """
    require_recording()
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as speaker,
    ):
        speaker.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        hearer, _ = listener.accept()
        with hearer:
            recording = Recording(folder / "wire.pcap", speaker, hearer)
            with _tcpdump(folder, ports=[*ports, recording.spoken_port]):
                yield recording
                recording.flush()


@contextmanager
def _tcpdump(folder: Path, *, ports: Sequence[int]) -> Iterator[None]:
    log, wanted = folder / "tcpdump.log", " or ".join(f"tcp port {port}" for port in ports)
    # To standard output: started by root, tcpdump becomes another user, who may not write to the folder.
    command = [program_path("tcpdump"), "-i", "lo", "-n", "-U", "-s", "0", "-B", str(BUFFER_KIB), "-w", "-", wanted]
    with (folder / "wire.pcap").open("wb") as output, log.open("wb") as messages:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=messages)
    try:
        _await_listening(process, log)
        yield
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(STOP_TIMEOUT_S)
    assert "\n0 packets dropped by kernel" in log.read_text(), log.read_text()


def records(stream: bytes) -> list[Record]:
    """Cut one direction of a connection into TLS records; the last may be a part of one."""
    found, position = [], 0
    while position + 5 <= len(stream):
        kind, _, length = struct.unpack_from("!BHH", stream, position)
        found.append(Record(kind, stream[position + 5 : position + 5 + length]))
        position += 5 + length
    return found


def _await_listening(process: subprocess.Popen[bytes], log: Path) -> None:
    give_up_s = time.monotonic() + START_TIMEOUT_S
    while "listening on lo" not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < give_up_s, log.read_text()
        time.sleep(0.02)


def _hello(stream: bytes, kind: int) -> bytes:
    """Return the handshake message that a direction begins with."""
    first = records(stream)[:1]
    assert first, f"expected a TLS record, got {stream[:32]!r}"
    assert (first[0].kind, first[0].content[:1]) == (HANDSHAKE, bytes([kind])), f"no TLS hello: {stream[:32]!r}"
    return first[0].content


def _segments(capture: bytes) -> Iterator[tuple[tuple[bytes, int], tuple[bytes, int], int, bytes]]:
    """Yield source, destination, sequence number and payload of every TCP segment that carries some."""
    position = _PCAP_HEADER_BYTES
    while position + _PACKET_HEADER_BYTES <= len(capture):
        length = int.from_bytes(capture[position + 8 : position + 12], "little")
        position += _PACKET_HEADER_BYTES
        packet = capture[position : position + length]
        position += length
        source, destination, segment = _addressed(packet)
        source_port, destination_port, sequence = struct.unpack_from("!HHI", segment)
        if payload := segment[4 * (segment[12] >> 4) :]:
            yield (source, source_port), (destination, destination_port), sequence, payload


def _addressed(packet: bytes) -> tuple[bytes, bytes, bytes]:
    """Return source, destination and TCP segment of an Ethernet frame."""
    kind, packet = int.from_bytes(packet[12:_ETHERNET_BYTES]), packet[_ETHERNET_BYTES:]
    match kind:
        case 0x0800:
            total = int.from_bytes(packet[2:4])
            return packet[12:16], packet[16:20], packet[4 * (packet[0] & 0x0F) : total]
        case 0x86DD:
            return packet[8:24], packet[24:40], packet[_IPV6_BYTES:]
        case _:
            raise AssertionError(f"expected IP, got frame type {kind:#06x}")


def _joined(segments: dict[int, bytes]) -> bytes:
    """Put segments, of which the first that came is the first, in the order of their sequence numbers."""
    start = next(iter(segments), 0)
    joined = bytearray()
    # Sequence numbers wrap; on loopback nothing overtakes the first segment.
    for offset, payload in sorted(((sequence - start) % (1 << 32), payload) for sequence, payload in segments.items()):
        joined[offset : offset + len(payload)] = payload
    return bytes(joined)
