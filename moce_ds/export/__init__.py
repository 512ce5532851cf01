"""From a run to the dense ViT of one route: selection, export, verification."""
