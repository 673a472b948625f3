"""Weights and tokenizers in: a base by name, from a file whose hash is known."""
