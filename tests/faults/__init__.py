"""Faults and attacks, one test each, by the ids of the table in docs/security.md."""
