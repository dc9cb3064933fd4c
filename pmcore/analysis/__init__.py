"""Questions about frames and processes, answered on any backend from its arrays."""
