"""How a model is run and read. Knows transformers and torch, and nothing of erasure or GRADIEND."""

from .pooling import POOLS, Reading, check_pool, counted, pooled, reading_of

__all__ = ["POOLS", "Reading", "check_pool", "counted", "pooled", "reading_of"]
