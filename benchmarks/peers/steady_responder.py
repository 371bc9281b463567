"""A responder that takes the same time for every request: nothing but its speed could be better.

It reads no input, runs no model and has no collector. What its slowest answers take is what requests that come as by
chance, one server and this machine make of it. Arguments: port, topic, QoS, seconds per request.
"""

import gc
import json
import struct
import sys
import time

from benchmarks.raw_mqtt import PUBLISH, RawClient, acknowledgement, sized
from edge_agent.front.mqtt.publication import Publication, decode_publication, with_length

OUTPUT = {"name": "scores", "shape": [1, 10], "datatype": "FP32", "data": [0.1] * 10}
PAYLOAD = json.dumps({"model_name": "peer", "model_version": "1", "outputs": [OUTPUT]}).encode()
CORRELATION_DATA = b"\x09"


def main() -> None:
    port, topic, qos, takes_s = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
    gc.disable()
    # Between two measurements nobody asks.
    client = RawClient(port, client_id="steady", topic_filter=topic, qos=qos, timeout_s=600)
    answered = 0
    while True:
        outgoing = []
        for header, packet in client.packets():
            if header & 0xF0 != PUBLISH:
                continue
            started_s = time.perf_counter()
            answered += 1
            outgoing.append(answer(decode_publication(header, packet, has_properties=True), answered % 65535 + 1))
            while time.perf_counter() - started_s < takes_s:
                pass
        if outgoing:
            client.send(b"".join(outgoing))


def answer(request: Publication, packet_id: int) -> bytes:
    assert request.response_topic is not None
    assert request.correlation is not None
    properties = with_length(CORRELATION_DATA + sized(request.correlation))
    identifier = struct.pack("!H", packet_id) if request.qos else b""
    content = sized(request.response_topic) + identifier + properties + PAYLOAD
    header = bytes([PUBLISH | request.qos << 1])
    return (acknowledgement(request.packet_id) if request.qos else b"") + header + with_length(content)


if __name__ == "__main__":
    main()
