"""An adapter that comes from a file: checked before it touches a model."""
