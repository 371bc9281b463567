"""A folder of hard examples for whoever retrains: the files, and an index with a line of JSON for each.

    DIR/AGENT-0123456789abcdef.npz     as they came, see `core.sample_file`
    DIR/index.jsonl                    {"file": …, "agent": …, "model": …, "label": …, "heavy_label": …, …}

May be filled in several goes: what is there already is not written again, and the index is made anew from the files.
Blocking.
"""

from collections.abc import Iterator
from pathlib import Path

from core.atomic_files import write_atomically
from core.digest import Digest, digest_of, hex_of
from core.errors import IntegrityError
from core.ids import checked_name
from core.sample_file import SampleView, read_description

INDEX = "index.jsonl"
# What devices sent is for whoever asked for it alone.
_MODE = 0o600
# Derived: enough of a digest that no two of a fleet's samples share it.
_NAME_DIGITS = 16


class _Line(SampleView):
    file: str
    agent: str
    digest: str


class SampleFolder:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def has(self, agent: str, digest: Digest) -> bool:
        path = self._path(agent, digest)
        return path.is_file() and digest_of(path.read_bytes()) == digest

    def add(self, agent: str, digest: Digest, content: bytes) -> SampleView:
        """Write a sample, whole; return what it is.

        Raises:
            IntegrityError: the bytes have another digest, or are no sample; nothing is written.
        """
        if digest_of(content) != digest:
            raise IntegrityError(f"sample {digest} of {agent}: expected other bytes; fetch it again")
        view = read_description(content)
        write_atomically(self._path(agent, digest), content, mode=_MODE)
        return view

    def write_index(self) -> int:
        """Write the index of all samples in the folder, the oldest first; return how many there are."""
        lines = sorted(self._lines(), key=lambda line: (line.taken_at, line.file))
        text = "".join(f"{line.model_dump_json()}\n" for line in lines)
        write_atomically(self._folder / INDEX, text.encode(), mode=_MODE)
        return len(lines)

    def _lines(self) -> Iterator[_Line]:
        for path in sorted(self._folder.glob("*.npz")):
            content = path.read_bytes()
            try:
                view = read_description(content)
            except IntegrityError:
                # Somebody else's.
                continue
            agent = path.stem[: -_NAME_DIGITS - 1]
            yield _Line(**view.model_dump(), file=path.name, agent=agent, digest=digest_of(content))

    def _path(self, agent: str, digest: Digest) -> Path:
        # A controller or an agent names them: they must not lead out of the folder.
        name = checked_name(agent, kind="agent")
        return self._folder / f"{name}-{hex_of(digest)[:_NAME_DIGITS]}.npz"
