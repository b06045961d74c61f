"""A stand-in, not the official code."""
