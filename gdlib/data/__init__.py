"""From files to training patches: `sources` read datasets, `prepare` checks and stores them,
`patches` feeds networks.
"""
