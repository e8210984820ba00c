"""A run's output for others to read: a recording, a page, an archive; and against another run's."""
