"""From an image of any size to affinities, foreground and embedding."""
