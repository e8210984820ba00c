"""The operator's terminal: the Screen, the keyboard, and the signals that come from it."""
