"""What runs on a host: Python 3.6, standard library only, and nothing of ours is imported."""
