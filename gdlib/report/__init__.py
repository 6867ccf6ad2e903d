"""What a reader sees: tables (`tables`) and figures (`charts`, `pictures`), all from files that the
pipeline wrote.

Nothing here computes a segmentation or needs torch. Equal inputs give equal bytes.
"""
