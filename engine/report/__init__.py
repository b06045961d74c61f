"""A report of runs: one page to read, figures and tables for a paper."""

from .make import make_report

__all__ = ["make_report"]
