"""The recent traces: spans from every process of the fleet, kept for looking at, forwarded for keeping.

    OTLP/gRPC ──▶ otlp.decode ──▶ service.Traces (bounded queue) ──▶ store (oldest rows go first)
    own spans ──▶ exporter ──┘          └──▶ forward.Forwarder ──▶ spool (on disk) ──▶ a collector

Spans live in a database of their own, so that a burst of them never delays the fleet's writes.
"""
