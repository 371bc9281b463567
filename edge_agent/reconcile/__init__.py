"""Desired state against what is: `planner` decides the next steps (pure), `executor` has them taken one at a time.

submit(desired) ─▶ Reconciler ─▶ plan(slots, current) ─▶ first of the steps ─▶ fetch, self-test, load ─▶ plan again …
                       ├──▶ Trials: what was loaded is on probation; in the end committed, or in quarantine: plan again
                       └──▶ Board: what is reported to the controller and shown in the status file
"""
