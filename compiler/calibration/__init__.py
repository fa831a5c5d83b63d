"""What a compile learns from text, block by block: codes, clip ratios, ranges, bits per layer, branches."""
