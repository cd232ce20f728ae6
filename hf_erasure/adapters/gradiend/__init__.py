"""The adapter that changes weights along a learned feature."""
