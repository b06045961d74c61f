"""Tests of the benches: their checks, their files and their command line; no timing is judged here."""
