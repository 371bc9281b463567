"""The agent's own HTTP face: the Open Inference Protocol, `/metrics` and `/healthz`, for programs beside it.

server       listens, with TLS or on loopback only; bounds what all connections hold together
connection   one connection: answers in the order of the requests, deadlines, who left
reading      bytes → requests: HTTP/1.1 (RFC 9112) on `httptools`, every part of one bounded
messages     requests, answers, and how an answer stands on the wire
inference    the Open Inference Protocol as routes
"""
