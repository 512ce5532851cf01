"""The training loop of every task, its engine, schedule and metrics; and pre-training, from its inputs to its task."""
