"""Tuning a trained encoder on a task: the task of the trainer that all share, and the labelled tasks."""
