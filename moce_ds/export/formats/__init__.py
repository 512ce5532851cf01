"""What an export can be written as: one module for each family of targets, all of them listed in `registry`."""
