"""The guards of a run, and all that they do for its program."""
