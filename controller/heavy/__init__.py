"""The heavy tier: large models on Ray Serve, reached over HTTP in the Open Inference Protocol.

    gateway ── client.HeavyClient ──HTTP──▶ Serve's ingress ──▶ application.HeavyModel (replicas)
                                                                   └─ store, model, grouping
    controller ── local.LocalHeavy ──starts──▶ embedded (child process) ──▶ application on a local Ray

Only `application` imports ray, and only the child process imports `application`: the controller itself stays free of
it. Any other server of the protocol can stand in for the whole tier, because the client speaks nothing but OIP.
"""
