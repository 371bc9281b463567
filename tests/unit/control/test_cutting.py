"""Cutting without a look inside."""

from pathlib import Path

from controller.registry.cutting import PlainCutter
from core.chunks import chunk_of
from core.manifest import MAX_CHUNK_BYTES


async def test_a_file_is_cut_every_mebibyte_and_an_empty_one_not_at_all(tmp_path: Path) -> None:
    content = bytes(MAX_CHUNK_BYTES) + b"rest"
    (tmp_path / "large").write_bytes(content)
    (tmp_path / "empty").write_bytes(b"")
    chunks = await PlainCutter().cut({"a": tmp_path / "large", "b": tmp_path / "empty"})
    assert chunks == {"a": (chunk_of(bytes(MAX_CHUNK_BYTES)), chunk_of(b"rest")), "b": ()}
