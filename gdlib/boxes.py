"""Boxes in images: tuples of slices, one per axis."""

Box = tuple[slice, ...]


def relative(box: Box, frame: Box) -> Box:
    """Return a box as seen from the corner of another."""
    return tuple(
        slice(s.start - f.start, s.stop - f.start) for s, f in zip(box, frame, strict=True)
    )


def absolute(box: Box, frame: Box) -> Box:
    """Return where a box is that is given as seen from the corner of another."""
    return tuple(
        slice(s.start + f.start, s.stop + f.start) for s, f in zip(box, frame, strict=True)
    )


def intersection(box: Box, other: Box) -> Box:
    """Return what two boxes share; without a common pixel, a box of size 0."""
    both = ((max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(box, other, strict=True))
    return tuple(slice(start, max(start, stop)) for start, stop in both)
