"""For tests: of tools that read page tables, and of backends."""
