"""Adapters on their way into an engine: read, placed in its frame, merged, and what is left of them."""
