"""What a process sees: VMAs, page tables, faults."""
