"""What every HTTP face of ours answers besides inference, whatever server carries it: health, metadata, the repository.

    Target (http_paths) + body ──▶ HttpFace.answer ──▶ Reply (http_form), or an error for `http_form.refusal`

Inference is not here: the gateway awaits it, the agent has it answered by a callback, and both use `http_form`.
"""

from collections.abc import Mapping, Sequence

import orjson

from core.errors import InvalidRequest, NotFound
from core.open_inference.http_form import Reply, json_reply
from core.open_inference.http_paths import Operation, Target
from core.open_inference.messages import ModelMetadata
from core.open_inference.service import DataPlane, Statistics
from core.open_inference.statistics import statistics_body
from core.tensors import TensorSpec

# The body of the index request has one flag, that of a load some names.
MAX_BODY_BYTES = 4096


class HttpFace:
    """`statistics` None: this plane counts nothing that it would tell here."""

    def __init__(
        self,
        plane: DataPlane,
        *,
        server_name: str,
        server_version: str,
        extensions: Sequence[str],
        statistics: Statistics | None = None,
    ) -> None:
        self._plane = plane
        self._server = {"name": server_name, "version": server_version, "extensions": extensions}
        self._statistics = statistics

    async def answer(self, target: Target, body: bytes) -> Reply:
        """Answer anything but inference.

        Raises:
            NanofleetError: it cannot be answered.
        """
        match target.operation:
            case Operation.LIVE:
                return json_reply({"live": True})
            case Operation.READY:
                is_ready = await self._plane.is_ready()
                return json_reply({"live": True, "ready": is_ready}, 200 if is_ready else 503)
            case Operation.SERVER_METADATA:
                return json_reply(self._server)
            case Operation.MODEL_METADATA:
                return json_reply(_metadata_body(await self._plane.metadata(target.model, target.version)))
            case Operation.MODEL_READY:
                return await self._model_ready(target)
            case Operation.INDEX:
                return await self._index(only_ready=_only_ready(body))
            case Operation.LOAD:
                _require_no_files(body)
                await self._plane.load(target.model)
                return json_reply({})
            case Operation.UNLOAD:
                _object_of(body)
                await self._plane.unload(target.model)
                return json_reply({})
            case Operation.STATISTICS if self._statistics is not None:
                return json_reply(statistics_body(await self._statistics.statistics(target.model, target.version)))
            case _:
                raise NotFound(f"{target.operation.value}: not served here")

    async def _model_ready(self, target: Target) -> Reply:
        """Clients look at the status only, so a model that is not ready must not answer 200."""
        is_ready = await self._plane.is_model_ready(target.model, target.version)
        return json_reply({"name": target.model, "ready": is_ready}, 200 if is_ready else 503)

    async def _index(self, *, only_ready: bool) -> Reply:
        entries = await self._plane.index()
        return json_reply(
            [
                {"name": entry.name, "version": entry.version, "state": entry.state, "reason": entry.reason}
                for entry in entries
                if not only_ready or entry.state == "READY"
            ]
        )


def _only_ready(body: bytes) -> bool:
    asked = _object_of(body)
    if not isinstance(asked.get("ready", False), bool):
        raise InvalidRequest('index: expected no body or a JSON object such as {"ready": true}')
    return bool(asked.get("ready", False))


def _require_no_files(body: bytes) -> None:
    """Models and their settings come from the fleet, so a load may bring neither ("model repository" extension)."""
    parameters = _object_of(body).get("parameters") or {}
    if not isinstance(parameters, dict) or parameters:
        raise InvalidRequest("load: expected no parameters; files and settings of a model come from the fleet")


def _object_of(body: bytes) -> Mapping[str, object]:
    try:
        asked = orjson.loads(body) if body else {}
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"body: expected a JSON object or none: {error}") from error
    if not isinstance(asked, dict):
        raise InvalidRequest("body: expected a JSON object or none")
    return asked


def _metadata_body(metadata: ModelMetadata) -> Mapping[str, object]:
    return {
        "name": metadata.name,
        "versions": metadata.versions,
        "platform": metadata.platform,
        "inputs": _signature_body(metadata.inputs),
        "outputs": _signature_body(metadata.outputs),
        "properties": dict(metadata.properties),
    }


def _signature_body(specs: Sequence[TensorSpec]) -> Sequence[Mapping[str, object]]:
    return [{"name": spec.name, "datatype": spec.datatype, "shape": spec.shape} for spec in specs]
