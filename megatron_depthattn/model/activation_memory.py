"""What the local core attention and the planner of memory both count with."""

BLOCK_ROWS = 128
"""Rows of queries that share a mask in the local core attention, where they are fewer than the keys."""
