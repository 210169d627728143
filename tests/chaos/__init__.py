"""Runs under kill -9: `python -m tests.chaos --help`. Not collected by pytest; its results accumulate in a file."""
