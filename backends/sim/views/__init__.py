"""What /proc shows: derived from the state, never changing it."""
