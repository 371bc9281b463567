"""Open Inference Protocol v2: messages, and codecs for its JSON, binary-tensor and protobuf bodies.

Source: https://github.com/kserve/open-inference-protocol and the Triton extensions "binary tensor data" and
"model repository".
"""
