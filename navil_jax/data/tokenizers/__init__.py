"""Tokenizers of the two kinds that the supported families use."""
