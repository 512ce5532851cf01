"""Tuning a trained encoder on a labelled task: classification, detection or segmentation."""
