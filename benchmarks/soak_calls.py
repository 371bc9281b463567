"""Programs on the device that ask their agent over its local faces: gRPC and HTTP in turns, each with a deadline."""

import asyncio
import itertools
import random
import time
from collections.abc import Sequence

import grpc
import httpx

from benchmarks.soak_record import Asked, Record, Reply
from core.addresses import Address
from core.open_inference import json_body, protobuf_body
from protos.inference.v2 import open_inference_pb2 as pb

DEADLINE_S = 3.0
Infer = grpc.aio.UnaryUnaryMultiCallable[pb.ModelInferRequest, pb.ModelInferResponse]
_METHOD = "/inference.GRPCInferenceService/ModelInfer"


def _serialized(message: pb.ModelInferRequest) -> bytes:
    return message.SerializeToString()


class Calls:
    def __init__(
        self, model: str, grpc_at: Address, http_at: Address, bodies: Sequence[bytes], *, record: Record
    ) -> None:
        self._url = f"http://{http_at}/v2/models/{model}/infer"
        self._grpc_at = str(grpc_at)
        self._bodies = bodies
        self._messages = [
            protobuf_body.encode_request(json_body.decode_request(body, model_name=model)) for body in bodies
        ]
        self._name = f"{grpc_at}/{{}}"
        self._record = record

    async def run(self, per_s: float) -> None:
        """Ask at random times until cancelled; what is under way then is not counted."""
        async with grpc.aio.insecure_channel(self._grpc_at) as channel, httpx.AsyncClient() as http:
            infer = channel.unary_unary(
                _METHOD,
                request_serializer=_serialized,
                response_deserializer=pb.ModelInferResponse.FromString,
            )
            async with asyncio.TaskGroup() as group:
                for number in itertools.count():
                    await asyncio.sleep(random.expovariate(per_s))
                    group.create_task(self._call(number, infer, http), name="call")

    async def _call(self, number: int, infer: Infer, http: httpx.AsyncClient) -> None:
        name, now_s = self._name.format(number), time.monotonic()
        is_http = number % 3 == 0
        self._record.ask(name, Asked("http" if is_http else "grpc", now_s, now_s + DEADLINE_S))
        try:
            if is_http:
                answer = await http.post(self._url, content=random.choice(self._bodies), timeout=DEADLINE_S)
                status = str(answer.status_code)
            else:
                await infer(random.choice(self._messages), timeout=DEADLINE_S)
                status = "200"
        except httpx.TimeoutException:
            return
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                return
            status = error.code().name
        self._record.reply(name, Reply(status), now_s=time.monotonic())
