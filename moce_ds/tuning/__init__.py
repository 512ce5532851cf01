"""Training on labelled tasks that starts from an encoder: detection and segmentation."""
