"""Learned rotations: `rqc rotate`."""
