"""An engine compared with PyTorch: what is stored, what is computed, by which limits."""
