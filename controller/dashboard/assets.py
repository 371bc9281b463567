"""Scripts, styles and the charting library, as the installed packages have them; nothing comes from elsewhere.

An asset asked for with its digest (`?v=`), as pages do, never changes and may be kept for a year; asked for without,
it is looked at again each time (`ETag`). Served to anybody: the page to sign in on needs the style, and all of it is
public code.
"""

import asyncio
import gzip
import hashlib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

from core.errors import NotFound, Unavailable

PREFIX = "/assets"
_FOLDER = Path(__file__).parent / "assets"
_MEDIA_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
CHARTS = "plotly.js"
_FOREVER = "public, max-age=31536000, immutable"


@dataclass(frozen=True, slots=True)
class Asset:
    media_type: str
    content: bytes
    compressed: bytes
    digest: str


class Assets:
    """All of them in memory, compressed once: some 5 MB, of which the charting library is nearly all."""

    def __init__(self) -> None:
        files = {path.name: path for path in sorted(_FOLDER.iterdir()) if path.suffix in _MEDIA_TYPES}
        # The file's name has nothing of the library's version, which the digest stands for.
        self._paths = {**files, CHARTS: _charts_path()}
        self._digests = {name: _digest(path.read_bytes()) for name, path in self._paths.items()}
        self._loaded: dict[str, Asset] = {}

    def url(self, name: str) -> str:
        return f"{PREFIX}/{name}?v={self._digests[name]}"

    async def serve(self, request: Request, name: str) -> Response:
        """Answer with an asset.

        Raises:
            NotFound: there is none of that name.
        """
        asset = await self._asset(name)
        is_exact = request.query_params.get("v") == asset.digest
        headers = {
            "etag": f'"{asset.digest}"',
            "cache-control": _FOREVER if is_exact else "no-cache",
            "vary": "accept-encoding",
        }
        if request.headers.get("if-none-match") == headers["etag"]:
            return Response(status_code=304, headers=headers)
        if "gzip" in request.headers.get("accept-encoding", ""):
            return Response(
                asset.compressed, headers={**headers, "content-encoding": "gzip"}, media_type=asset.media_type
            )
        return Response(asset.content, headers=headers, media_type=asset.media_type)

    async def _asset(self, name: str) -> Asset:
        path = self._paths.get(name)
        if path is None:
            raise NotFound(f"asset {name[:80]!r}: there is none of that name; load the page again")
        if (asset := self._loaded.get(name)) is None:
            asset = self._loaded[name] = await asyncio.to_thread(_load, path)
        return asset


def _load(path: Path) -> Asset:
    content = path.read_bytes()
    return Asset(_MEDIA_TYPES[path.suffix], content, gzip.compress(content, 6, mtime=0), _digest(content))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _charts_path() -> Path:
    """Return the charting library's script, without importing its Python side."""
    spec = find_spec("plotly")
    if spec is None or spec.origin is None:
        raise Unavailable("dashboard: plotly is not installed; pip install 'nanofleet[controller]'")
    return Path(spec.origin).parent / "package_data" / "plotly.min.js"
