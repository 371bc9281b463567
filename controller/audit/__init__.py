"""Who changed what: a durable, append-only record.

    request ─▶ begin (an open act, stored) ─▶ the change ─▶ end (an entry at the end of the chain)
    our own decisions, sign-ins, refusals ─▶ report ─▶ a bounded queue ─▶ entries

An act that is still open when the controller starts was cut off; it becomes an entry that says so. Every entry carries
the SHA-256 of the one before it. `model` has the values, `chain` the linking, `use_cases` the transactions, `store` the
port to a database, `budget` the bound on refusals, `service` what one may do.
"""
