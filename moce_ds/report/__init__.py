"""HTML reports about runs and studies."""
