"""Desired state against what is: `planner` decides the next steps (pure), `executor` takes them one at a time.

submit(desired) ─▶ Reconciler ─▶ plan(slots, current) ─▶ first step ─▶ store, Fetch, ModelHost ─▶ plan again …
                       └──▶ Board: what is reported to the controller and shown in the status file
"""
