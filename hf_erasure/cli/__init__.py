"""The `hf-erasure` command: it runs recipes, works with finished adapters, and measures models with adapters."""

# In the order in which the help lists their commands.
from . import recipes, looking, show, evaluation, adapters  # isort: skip
from .app import app

__all__ = ["adapters", "app", "evaluation", "looking", "recipes", "show"]
