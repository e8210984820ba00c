"""Fleets: one program on many hosts, as one durable thing with an id of its own."""
