"""What cannot leave now and must not be lost: a queue on disk, on a thread of its own, emptied when the link is up.

    rows       the values: kinds, bounds, why a row was lost
    ageing     how old a row is, whatever happens to the wall clock
    database   the queue on SQLite;  ring  the same in memory, small, for when the disk takes nothing
    storage    chooses between the two, on the outbox's thread, and never raises
    outbox     the loop's side: `put` costs no wait, a whole gathering of rows is one commit
    courier    empties one kind, in order, in small batches; receivers  to whom
    deferrals  escalations for later;  ledger, watch, telemetry  what else is put

Why a database here and nowhere else in the agent: ADR 28.
"""
