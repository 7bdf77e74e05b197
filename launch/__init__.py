"""Training on Google Cloud TPUs: `python -m launch ROAD ACTION`. Each road is a module (docs/pods.md)."""
