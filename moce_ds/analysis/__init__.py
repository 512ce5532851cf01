"""What a run looks like: statistics, pictures and the HTML report. Reads files only."""
