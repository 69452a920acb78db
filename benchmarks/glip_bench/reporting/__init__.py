"""What becomes of a result: files, text, reports, comparisons, the paper's table."""
