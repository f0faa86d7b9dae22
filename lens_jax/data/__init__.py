"""From files to batches: sources, samples, preprocessing, the input pipeline."""
