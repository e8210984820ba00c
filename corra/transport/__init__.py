"""Bytes to a command and back."""
