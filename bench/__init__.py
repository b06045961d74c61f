"""Benchmarks. Most need a GPU; what they print is cost, and quality stands beside it where weights are trained."""
