"""System calls: the checks in the order of the kernel, and what they set in motion."""
