"""Cleaning: which samples of the sources training is better without, and why, see `clean`."""
