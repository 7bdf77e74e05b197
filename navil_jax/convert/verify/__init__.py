"""Verification: a checkpoint against another one, or against golden outputs."""
