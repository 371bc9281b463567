"""Requests and replies over MQTT 5 and 3.1.1: connection, wire mapping, duplicates, and the front that joins them."""
