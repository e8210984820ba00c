"""The agent on a host, as the client places it and speaks to it."""
