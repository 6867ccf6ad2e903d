"""Data sources: one file, one function each, found by `gdlib.registry.SOURCES` under the name of
the file.

A source takes the folder of the raw data (or None) and keyword-only options, and returns for each
of `train`, `val` and `test` an iterator of `Sample` that reads one image at a time. The first line
of the module docstring says origin and licence; it travels with the data.
"""
