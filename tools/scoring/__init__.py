"""What tools/schemes is made of."""
