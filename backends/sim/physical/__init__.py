"""What memory is: frames, free blocks, compound pages, contents."""
