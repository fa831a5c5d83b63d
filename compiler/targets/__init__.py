"""What each target can run, and the passes that lower a graph to it."""

from __future__ import annotations
