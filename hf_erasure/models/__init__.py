"""Runs a model and reads its activations and outputs. It uses transformers and torch, not erasure or GRADIEND."""
