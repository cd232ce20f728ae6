"""The adapter that erases a concept from activations."""
