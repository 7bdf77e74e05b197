"""Inspection of data: the doctor, previews, and what an image costs in tokens."""
