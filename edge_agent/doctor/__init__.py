"""`nanofleet-agent doctor`: the usual misconfigurations of an agent's machine, and what to do about each.

    command ─▶ checks (settings, identity, folder, controller, ONNX Runtime) ─▶ core.doctor.run_checks ─▶ table or JSON
             └▶ broker (one connection of its own: reachable, quick, permitted)

Works beside a running agent and without one. What is not looked at says why. Nothing heavy is imported here: ONNX
Runtime is tried in a child process.
"""
