"""Toy data sets that need no download."""
