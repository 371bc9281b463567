"""Bytes on their way to agents: chunks encoded beforehand, differences between versions, fair sending."""
