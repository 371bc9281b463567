"""Bytes from the controller by digest, over `ArtifactService.Fetch`; blocking, for the thread that loads models."""

from collections.abc import Callable, Iterator
from typing import Protocol, cast

import grpc

from core.digest import Digest
from core.errors import NotFound, UnknownModel
from core.status import error_from_grpc
from protos.artifacts.v1 import artifacts_pb2 as pb
from protos.artifacts.v1.artifacts_pb2_grpc import ArtifactServiceStub


class Artifacts(Protocol):
    """Where a replica gets bytes from."""

    def fetch(self, digest: Digest) -> Iterator[bytes]:
        """Yield the blob in order, in pieces; the caller verifies.

        Raises:
            UnknownModel: there is no such blob.
            Unavailable: the controller is away.
        """
        ...


class GrpcArtifacts:
    """The artifacts of the controller, over a channel for each blob: they are few, and a certificate may be new."""

    def __init__(self, open_channel: Callable[[], grpc.Channel], *, fetch_timeout_s: float = 600.0) -> None:
        self._open_channel = open_channel
        self._fetch_timeout_s = fetch_timeout_s

    def fetch(self, digest: Digest) -> Iterator[bytes]:
        with self._open_channel() as channel:
            yield from self._pieces(channel, digest)

    def _pieces(self, channel: grpc.Channel, digest: Digest) -> Iterator[bytes]:
        call = ArtifactServiceStub(channel).Fetch(pb.FetchRequest(digest=digest), timeout=self._fetch_timeout_s)
        try:
            for chunk in call:
                yield chunk.data
        except grpc.RpcError as error:
            # What a call raises is a grpc.Call as well; the types do not say so.
            raise _fetch_error(digest, cast("grpc.Call", error)) from error
        finally:
            call.cancel()


def _fetch_error(digest: Digest, error: grpc.Call) -> Exception:
    typed = error_from_grpc(error.code(), f"fetching {digest} from the controller: {error.details()}")
    return UnknownModel(f"no model has the digest {digest}") if isinstance(typed, NotFound) else typed
