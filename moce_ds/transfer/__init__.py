"""From a trained run to a dense expert and its accuracy on a task."""
