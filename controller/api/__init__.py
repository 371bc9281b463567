"""The controller's faces: what each transport decodes, calls and encodes. No decision about the fleet is made here.

`open_inference_http` serves a data plane, `operator_rest` (with `operator_views`) the operator; `http_app` puts both on
one port, with the error shapes of `problems` and the bounded bodies of `http_bodies`. The gRPC faces are `agents_grpc`,
`artifacts_grpc` and `otlp_grpc`. `http_server` and `grpc_server` are the two ports.
"""
