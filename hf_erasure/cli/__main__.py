"""`python -m hf_erasure.cli`."""

from . import app

app()
