"""Scaling studies: results files, laws with intervals, figures, advice, and grids of runs (paper sections 3 and 4)."""
