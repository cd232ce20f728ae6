"""Runs a model and reads its activations and outputs. It uses transformers and torch, not erasure or GRADIEND."""

from .pooling import POOLS, Reading, check_pool, counted, pooled, reading_of

__all__ = ["POOLS", "Reading", "check_pool", "counted", "pooled", "reading_of"]
