"""From features of images to clusters: k-means, balanced assignment, and how well clusters separate."""
