"""Encoders from weights on disk, and the features that they compute."""
