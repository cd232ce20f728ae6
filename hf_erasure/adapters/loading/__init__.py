"""Loading an adapter from a file: it is checked before it is attached to a model."""
