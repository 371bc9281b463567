"""How a model comes into service and leaves it again: self-test, probation, rollback, quarantine, the journal."""
