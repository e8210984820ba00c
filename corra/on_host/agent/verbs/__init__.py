"""What a request asks for: the verbs. No guard needs any of it, so a guard is started without it."""
