"""The executable reference: one page at a time, plain Python, no arrays. Slow and meant to be read."""
