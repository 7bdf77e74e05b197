"""Files -> samples -> tokens and patches -> packed batches."""
