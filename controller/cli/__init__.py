"""The `nanofleet` command. It speaks only REST to a running controller; three commands do things here instead.

    app ──▶ models · devices · deploy · traces · operators ──▶ client ──HTTP──▶ controller  (controller.api.*_views)
                     watching · completion      credential ──▶   │
        ──▶ processes: `controller init`, `controller run`, `demo`; what they need is imported when they run

Exit codes: 0 done, 1 refused or failed, 2 wrong usage, 3 no controller reached, 130 interrupted. Results go to standard
output, progress and errors to standard error. `--help` must stay fast: nothing here imports a database, a web
framework, ONNX or Ray.
"""
