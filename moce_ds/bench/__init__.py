"""Speed measurements, as ratios between alternatives in one run."""
