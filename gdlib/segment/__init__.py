"""From affinities to labels (arrays in, arrays out, without torch).

Nothing is imported here: the configuration reads names and ranges of parameters without what
segments.
"""
