"""Triton kernels, one file an operation; see README.md beside this for what each does and how far it has been checked."""
