"""What one would write without nanofleet: paho-mqtt, json and onnxruntime. Arguments: port, topic, model file."""

# mypy: ignore-errors
import json
import socket
import sys

import numpy as np
import onnxruntime
import paho.mqtt.client as mqtt
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

port, topic, path = int(sys.argv[1]), sys.argv[2], sys.argv[3]
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(path, options)


def on_message(client, _user, message):
    tensor = json.loads(message.payload)["inputs"][0]
    array = np.array(tensor["data"], dtype=np.float32).reshape(tensor["shape"])
    scores = session.run(None, {tensor["name"]: array})[0]
    output = {"name": "scores", "shape": scores.shape, "datatype": "FP32", "data": scores.ravel().tolist()}
    properties = Properties(PacketTypes.PUBLISH)
    properties.CorrelationData = message.properties.CorrelationData
    reply = json.dumps({"model_name": "peer", "model_version": "1", "outputs": [output]})
    client.publish(message.properties.ResponseTopic, reply, qos=message.qos, properties=properties)


client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv5)
client.on_message = on_message
client.on_socket_open = lambda _client, _user, sock: sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
client.on_connect = lambda client, *_: client.subscribe(topic, qos=1)
client.connect("127.0.0.1", port)
client.loop_forever()
