"""Runs: started, followed, found again and stopped."""
