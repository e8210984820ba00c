"""Bytes to a command through Fabric's connection."""
