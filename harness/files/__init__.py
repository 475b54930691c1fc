"""Files that somebody else may have written."""
