"""A stand-in, not the official code. There this imports much that is never timed; here it refuses."""

raise ImportError("the bench needs no more of opensora than what it times")
