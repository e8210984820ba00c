"""What keeps a run: the guards, and all that they do for its program."""
