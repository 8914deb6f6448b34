"""The suites of `benchmark.py --device cuda`: how a GPU is timed, what is timed there, and what is found."""
