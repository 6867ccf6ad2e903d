"""Images and volumes that are too large to be segmented at once."""
