"""Merging adapters into weights, and exporting them for other programs."""
