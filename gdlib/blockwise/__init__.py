"""Images of any size, block by block, and a network that is run without torch, in 8 bits.

Nothing here imports torch, which would take most of the time of a command on few images.
"""
