"""Attention kernels for TPUs: Pallas programs over the pairs of blocks that share a segment."""
