"""Ordered steps made of runs, which go on where they were."""
