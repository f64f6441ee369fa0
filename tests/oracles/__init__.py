"""Slow, obviously right versions of what attnlens computes fast."""
