"""Recipes, which lead from a YAML file to an adapter folder, for both kinds of adapter: the command line runs them."""

from .erasure import embedded_model
from .occupations import occupation_sentences

__all__ = ["embedded_model", "occupation_sentences"]
