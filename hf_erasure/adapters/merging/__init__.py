"""Adapters written into weights: merged, combined, exported."""
