"""Batch files for Slurm; `vidtta submit` hands them to sbatch."""
