"""The `hf-erasure` command: running recipes, what becomes of a finished adapter, and measuring models with adapters."""

from . import adapters, evaluation, looking, recipes, show
from .app import app

__all__ = ["adapters", "app", "evaluation", "looking", "recipes", "show"]
