"""Checkpoints: format, manager, run folder and lease, DeepSpeed's state."""
