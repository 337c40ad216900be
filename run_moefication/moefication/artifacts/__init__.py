"""What one stage hands the next, read back and checked."""
