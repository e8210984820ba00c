"""The operator's terminal: what it shows, what is typed on it, which signals it sends."""
