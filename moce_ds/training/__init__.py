"""Engine, schedule, loop, checkpoints and metrics of pre-training."""
