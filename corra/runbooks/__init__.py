"""Runbooks: ordered steps made of runs. A second pass goes on where the first one stopped."""
