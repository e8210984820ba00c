"""The verbs, for what a request asks. No guard needs any of it: it starts without this folder."""
