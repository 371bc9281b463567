"""The `nanofleet` command. It speaks only REST to a running controller; two commands start things instead.

    app ──▶ models · devices · deploy · traces ──▶ client ──HTTP──▶ controller  (controller.api.operator_views)
        ──▶ processes: `controller run`, `demo`; what they start is imported when they run

Exit codes: 0 done, 1 refused or failed, 2 wrong usage, 3 no controller reached. Results go to standard output, progress
and errors to standard error. `--help` must stay fast: nothing here imports a database, a web framework, ONNX or Ray.
"""
