"""Training: patches in, weights and their history out."""
