"""HTML reports and inspection of what is on disk."""
