"""Data sets: each source is a sequence of samples."""
