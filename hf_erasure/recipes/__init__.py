"""From a YAML file to an adapter folder, for both kinds: what the command line runs."""

from .erasure import embedded_model
from .occupations import occupation_sentences

__all__ = ["embedded_model", "occupation_sentences"]
