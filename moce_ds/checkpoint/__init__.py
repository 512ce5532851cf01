"""Checkpoints: format, manager, run lease, DeepSpeed's state, import."""
