"""Tests of the batch files and of `vidtta submit` on a real Slurm of one node, which `local.py` starts."""
