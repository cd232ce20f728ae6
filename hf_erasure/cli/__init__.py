"""The `hf-erasure` command; a file a topic."""

from . import erasure, evaluation, gradiend, hub, schema
from .app import app

__all__ = ["app", "erasure", "evaluation", "gradiend", "hub", "schema"]
