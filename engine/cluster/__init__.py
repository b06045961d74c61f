"""Runs on a cluster: which task this is, who is at work, what a machine's failure is, ranges and their submission to Slurm."""
