"""A stand-in, not timm. There this imports all of its models; here it refuses."""

raise ImportError("the bench needs no more of timm than two files")
