"""What moves pages: swap, reclaim, huge pages, write tracking."""
