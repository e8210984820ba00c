class SchemaError(ValueError):
    """A job that isn't as its schema says."""
