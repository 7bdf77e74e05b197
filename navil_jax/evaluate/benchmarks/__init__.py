"""The benchmarks of the paper: one module for a benchmark or for a family that shares its metric."""
