"""The commands."""

BLOCK_HELP = (
    "largest part predicted in one pass, in pixels, e.g. 1024 or 32x512x512; larger is faster "
    "where there is memory for it, the result is the same (default: 1024 in 2D, 32x256x256 in 3D)"
)
