"""From features of images to clusters: k-means, balanced assignment, and the artefact that labels new images."""
