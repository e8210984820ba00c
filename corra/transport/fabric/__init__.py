"""Carries bytes to a command through Fabric's connection."""
