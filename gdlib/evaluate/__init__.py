"""From labels to numbers (numpy only)."""
