"""From affinities to labels (numpy only).

Nothing is imported here: the configuration reads names and ranges of parameters without what
segments.
"""
