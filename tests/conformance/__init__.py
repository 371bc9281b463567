"""Clients that nobody here wrote, against our faces.

`clients/` holds programs for an environment of their own, with the stock `tritonclient`: each takes the address of a
server that has the models of `tests.support.conformance_models` and prints one JSON object, check → "" or what went
wrong. The tests run them as processes, because a second copy of the `inference` protobuf symbols cannot be loaded here.
"""
