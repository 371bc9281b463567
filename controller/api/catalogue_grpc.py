"""CatalogueService: TUF metadata by name. It is signed, so nothing here is secret or has to be believed."""

from typing import Protocol

import grpc.aio

from core.errors import NanofleetError
from core.status import STATUS
from protos.catalogue.v1 import catalogue_pb2 as pb
from protos.catalogue.v1.catalogue_pb2_grpc import CatalogueServiceServicer

Context = grpc.aio.ServicerContext[pb.GetMetadataRequest, pb.MetadataFile]


class Metadata(Protocol):
    async def metadata(self, name: str) -> bytes:
        """Return a file by its TUF name. Raises NotFound; any other text is a name that nothing has."""
        ...


class CatalogueServicer(CatalogueServiceServicer):
    def __init__(self, catalogue: Metadata) -> None:
        self._catalogue = catalogue

    async def GetMetadata(  # noqa: N802
        self, request: pb.GetMetadataRequest, context: Context
    ) -> pb.MetadataFile:
        try:
            return pb.MetadataFile(name=request.name, content=await self._catalogue.metadata(request.name))
        except NanofleetError as error:
            await context.abort(STATUS[error.code].grpc, str(error))
