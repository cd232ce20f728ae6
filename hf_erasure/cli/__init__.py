"""The `hf-erasure` command: it runs recipes, works with finished adapters, and measures models with adapters."""

from . import adapters, evaluation, looking, recipes, show
from .app import app

__all__ = ["adapters", "app", "evaluation", "looking", "recipes", "show"]
