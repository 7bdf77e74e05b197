"""Flags of XLA with which programs compile in a fraction of the time; what they compute stays the same."""

from importlib.metadata import version

QUICK = "--xla_backend_optimization_level=0"
if version("jaxlib").startswith("0.10."):  # jaxlib 0.12 stops at flags that it does not know, and this is one
    QUICK += " --xla_cpu_use_fusion_emitters=false"
