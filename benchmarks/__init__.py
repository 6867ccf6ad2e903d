"""Benchmarks of `python -m benchmarks`, one file per group: the cases, and a plain implementation
of the same to measure against.

A reference does what a careful reader of the paper, or of a library's manual, would write first:
loops over instances and images, whole matrices of pairs, one call of a library. None is slowed down
on purpose, and each result is checked against ours.
"""
