"""What an update costs on the wire: differences between two versions of a model, against what others would send.

    python -m benchmarks.delta --json

Pairs: the sentence model MiniLM before and after 40 steps of fine-tuning (`benchmarks.minilm`) in int8 and float32,
with only its last layer trained, and digits classifiers in static int8 before and after three more passes over their
data. Ours goes the way of a release: cut, packed in full, packed as a delta, applied by a process of its own. Its bytes
are those of all chunks that travel, and of the manifest. Peers, on the whole int8 file in turns with ours: zstd-19,
zstd-19 with the old file as its prefix (`zstd --patch-from`), bsdiff4, and content-defined chunks of about 64 KiB.
"""

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import bsdiff4
import numpy as np
import zstandard

from controller.transfer.cuts import cut_file, layout_of
from controller.transfer.encoding import VariantFiles, build_delta, build_full
from controller.transfer.packs import Form, PackFile, PackId
from core.digest import digest_of_file
from core.manifest import File, Lineage, Manifest, Signature
from core.tensors import Datatype

LEVEL = 19
# Content-defined chunks: a boundary where 16 bits of a hash over 32 bytes are zero, 64 KiB apart on average.
GEAR_BYTES, BOUNDARY_BITS = 32, 16
MIN_CHUNK_BYTES, MAX_CHUNK_BYTES = 16 << 10, 256 << 10


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", type=Path, help="keep the models in this folder, and use those that are there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="nanofleet-bench-") as folder:
        figures = measure(Path(folder), arguments.models or Path(folder) / "models", rounds=arguments.rounds)
    print(json.dumps(figures) if arguments.json else json.dumps(figures, indent=2))


def measure(folder: Path, models: Path, *, rounds: int) -> dict[str, object]:
    make_models(models)
    int8 = [
        Pair(models / "before.int8.onnx", models / "after.int8.onnx", folder / f"int8-{turn}") for turn in range(rounds)
    ]
    raw = [measure_round(pair, ours_first=turn % 2 == 0) for turn, pair in enumerate(int8)]
    others = {
        name: ours(Pair(models / f"before.{kind}.onnx", models / f"{after}.{kind}.onnx", folder / name))
        for name, after, kind in (
            ("int8_per_channel", "after", "channels"),
            ("fp32", "after", "fp32"),
            ("last_layer", "last", "int8"),
            ("digits", "after", "digits"),
            ("digits_wide", "after", "digits-wide"),
        )
    }
    return {
        "benchmark": "delta",
        "int8_ratio": raw[0]["ours"].ratio,
        **{f"{name}_ratio": found.ratio for name, found in others.items()},
        **summary(raw),
        "fp32_build_s": round(others["fp32"].build_s, 2),
        "fp32_apply_s": round(others["fp32"].apply_s, 3),
        "apply_mb": round(max(found.apply_mb for found in (raw[0]["ours"], *others.values())), 1),
        **circumstances(models, rounds),
    }


def summary(raw: list[dict[str, Any]]) -> dict[str, object]:
    peers = [name for name in raw[0] if name != "ours"]
    mine = [turn["ours"] for turn in raw]
    return {
        "build_s": round(median(found.build_s for found in mine), 3),
        "full_pack_s": round(median(found.full_s for found in mine), 3),
        "apply_s": round(median(found.apply_s for found in mine), 3),
        "build_speedup_vs_bsdiff": round(median(turn["bsdiff4"].build_s / turn["ours"].build_s for turn in raw), 1),
        **{f"{name}_ratio": raw[0][name].ratio for name in peers},
        **{f"{name}_build_s": round(median(turn[name].build_s for turn in raw), 2) for name in peers},
    }


def circumstances(models: Path, rounds: int) -> dict[str, object]:
    sizes = {path.name: path.stat().st_size for path in sorted(models.glob("after.*.onnx"))}
    machine = f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}"
    return {"machine": machine, "rounds": rounds, "file_bytes": sizes}


# ---- models ---------------------------------------------------------------------------------------------------------


def make_models(folder: Path) -> None:
    """Train and export what is not there yet, each family in a process of its own: torch is not needed afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    for module, last in (("minilm", "last.channels.onnx"), ("digits_pair", "after.digits-wide.onnx")):
        if not (folder / last).exists():
            command = [sys.executable, "-m", f"benchmarks.{module}", str(folder)]
            subprocess.run(command, check=True, stdout=sys.stderr)


# ---- ours -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pair:
    before: Path
    after: Path
    folder: Path


@dataclass(frozen=True, slots=True)
class Coded:
    """`ratio` is to the size of the new file; `build_s` is what the delta takes once the full pack is there."""

    ratio: float
    build_s: float
    full_s: float = 0.0
    apply_s: float = 0.0
    apply_mb: float = 0.0


def ours(pair: Pair) -> Coded:
    root = pair.folder / "packs"
    before, after = described(pair.before, version=1), described(pair.after, version=2)
    full_path, delta_path = (PackId(after.digest, source).path(root) for source in (None, before.digest))
    for path in (full_path, delta_path):
        path.parent.mkdir(parents=True)
    full_s = timed(lambda: build_full(after, full_path))
    full = PackFile.open(root, PackId(after.digest))
    build_s = timed(lambda: build_delta(after, before, full, delta_path))
    wire_bytes = len(after.manifest.to_bytes()) + encoded_bytes(full, root, PackId(after.digest, before.digest))
    full.close()
    applied = apply(pair, root, before, after)
    ratio = round(wire_bytes / pair.after.stat().st_size, 4)
    return Coded(ratio, build_s, full_s, applied["seconds"], applied["grown_mb"])


def encoded_bytes(full: PackFile, root: Path, pack: PackId) -> int:
    delta = PackFile.open(root, pack)
    try:
        if delta.is_useless:
            return int(full.encoded_sizes.sum())
        return int(delta.encoded_sizes.sum() + full.encoded_sizes[delta.has(Form.FULL)].sum())
    finally:
        delta.close()


def described(path: Path, *, version: int) -> VariantFiles:
    paths = {"model.onnx": path}
    chunks = cut_file(path, layout_of(paths).regions["model.onnx"])
    file = File(path="model.onnx", digest=digest_of_file(path), size_bytes=path.stat().st_size, chunks=chunks)
    signature = (Signature(name="x", datatype=Datatype.FP32, shape=(-1,)),)
    manifest = Manifest(
        model="model",
        version=version,
        variant="original",
        entry="model.onnx",
        files=(file,),
        inputs=signature,
        outputs=signature,
        lineage=Lineage(recipe="original"),
    )
    return VariantFiles(manifest.digest(), manifest, paths)


def apply(pair: Pair, root: Path, before: VariantFiles, after: VariantFiles) -> dict[str, float]:
    """Let a process of its own make the new file, and compare."""
    target, job = pair.folder / "applied", pair.folder / "job.json"
    sides = {"before": before.manifest.to_bytes().decode(), "after": after.manifest.to_bytes().decode()}
    job.write_text(json.dumps({**sides, "root": str(root), "source": str(pair.before), "target": str(target)}))
    command = [sys.executable, "-m", "benchmarks.delta_apply", str(job)]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    assert digest_of_file(target) == digest_of_file(pair.after)
    target.unlink()
    return found


# ---- peers ----------------------------------------------------------------------------------------------------------


def measure_round(pair: Pair, *, ours_first: bool) -> dict[str, Any]:
    mine = {"ours": ours(pair)} if ours_first else {}
    before, after = pair.before.read_bytes(), pair.after.read_bytes()
    peers: dict[str, Callable[[bytes, bytes], int]] = {
        "zstd19": full_zstd,
        "patch_from": patch_from,
        "bsdiff4": lambda old, new: len(bsdiff4.diff(old, new)),
        "cdc64k": content_defined,
    }
    theirs = {name: coded_by(encode, before, after) for name, encode in peers.items()}
    return {**(mine or {"ours": ours(pair)}), **theirs}


def coded_by(encode: Callable[[bytes, bytes], int], before: bytes, after: bytes) -> Coded:
    started_s = time.perf_counter()
    size_bytes = encode(before, after)
    return Coded(round(size_bytes / len(after), 4), time.perf_counter() - started_s)


def full_zstd(_: bytes, after: bytes) -> int:
    return len(zstandard.ZstdCompressor(level=LEVEL).compress(after))


def patch_from(before: bytes, after: bytes) -> int:
    window_log = max((len(before) + len(after)).bit_length(), 10)
    parameters = zstandard.ZstdCompressionParameters.from_level(LEVEL, window_log=window_log, enable_ldm=True)
    prefix = zstandard.ZstdCompressionDict(before, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    return len(zstandard.ZstdCompressor(compression_params=parameters, dict_data=prefix).compress(after))


def content_defined(before: bytes, after: bytes) -> int:
    """Return what the chunks that `before` does not have take, each compressed."""
    held = {hashlib.sha256(chunk).digest() for chunk in content_chunks(before)}
    new = [chunk for chunk in content_chunks(after) if hashlib.sha256(chunk).digest() not in held]
    compressor = zstandard.ZstdCompressor(level=LEVEL)
    return sum(len(compressor.compress(chunk)) for chunk in new)


def content_chunks(content: bytes) -> Iterator[bytes]:
    start = 0
    for boundary in [*boundaries(content), len(content)]:
        while boundary - start > MAX_CHUNK_BYTES:
            yield content[start : start + MAX_CHUNK_BYTES]
            start += MAX_CHUNK_BYTES
        if boundary - start >= MIN_CHUNK_BYTES or boundary == len(content):
            yield content[start:boundary]
            start = boundary


def boundaries(content: bytes) -> list[int]:
    """Return where the gear hash (Xia et al. 2016, "FastCDC", section 3.2) of the bytes before has its bits zero."""
    gear = np.random.default_rng(0).integers(0, 1 << 32, 256, dtype=np.uint32)
    found: list[int] = []
    block_bytes = 4 << 20
    for start in range(0, len(content), block_bytes):
        lead = min(start, GEAR_BYTES - 1)
        values = gear[np.frombuffer(content, np.uint8)[start - lead : start + block_bytes]]
        hashes = values.copy()
        for age in range(1, GEAR_BYTES):
            hashes[age:] += values[:-age] << np.uint32(age)
        is_boundary = hashes[lead:] >> np.uint32(32 - BOUNDARY_BITS) == 0
        found += (np.flatnonzero(is_boundary) + start + 1).tolist()
    return found


def timed(work: Callable[[], None]) -> float:
    started_s = time.perf_counter()
    work()
    return time.perf_counter() - started_s


if __name__ == "__main__":
    main()
