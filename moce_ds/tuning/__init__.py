"""Tuning a trained encoder on a task: a loop that all tasks share, and the tasks."""
