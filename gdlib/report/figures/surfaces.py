"""Shaded pictures of objects in space, with numpy and scipy alone.

A surface is a cloud of points with normals, taken from a smoothed mask. Every point becomes a small
square of pixels, the nearest one wins, and light falls on what is left. All vectors are (z, y, x)
in nm.
"""

from typing import NamedTuple

import numpy as np
from scipy import ndimage

# direction to it along right, up, away: upper left, behind the reader
LIGHT = np.array([-0.45, 0.6, -0.66])


class Surface(NamedTuple):
    """The surface of an object.

    Attributes:
        points: (N, 3) in nm.
        normals: (N, 3), outward, of length 1.
    """

    points: np.ndarray
    normals: np.ndarray


def surface(mask: np.ndarray, voxel: tuple[float, ...], cell: float) -> Surface:
    """Return the smooth surface of a mask.

    Args:
        mask: (Z, Y, X) bool.
        voxel: side lengths of a voxel in nm.
        cell: about the distance of neighbouring points in nm, the finest detail that is kept.

    Returns:
        Points in nm from the outer corner of the first voxel. Objects that reach the border of the
        mask are closed there.
    """
    step = np.maximum(np.round(cell / np.array(voxel)), 1).astype(int)  # voxels per block
    repeat = np.maximum(np.round(np.array(voxel) * step / cell), 1).astype(int)  # cells per block
    size = np.array(voxel) * step / repeat  # of a cell
    found = ndimage.find_objects(mask.astype(np.uint8))
    if not found:
        return Surface(np.zeros((0, 3)), np.zeros((0, 3)))
    first = np.array([side.start for side in found[0]]) // step * step  # of a block
    mask = mask[tuple(slice(k, side.stop) for k, side in zip(first, found[0], strict=True))]
    field = np.pad(
        mask, [(2 * s, 2 * s + -n % s) for n, s in zip(mask.shape, step, strict=True)]
    ).astype(np.float32)
    for axis in range(3):
        blocks = field.shape[axis] // step[axis]
        shape = (*field.shape[:axis], blocks, step[axis], *field.shape[axis + 1 :])
        field = field.reshape(shape).mean(axis=axis + 1)
    # Then larger, and last along the axis that grows most. The stairs between blocks that are
    # thicker than cells become slopes.
    for axis in np.argsort(repeat, kind="stable"):
        slopes = _slopes(field.shape[axis], repeat[axis])
        field = np.moveaxis(np.tensordot(slopes, field, (1, axis)), 0, axis)
    inside = field > 0.5
    border = np.zeros_like(inside)
    for axis in range(3):
        here, there = np.moveaxis(border, axis, 0)[1:-1], np.moveaxis(inside, axis, 0)
        here |= ~(there[:-2] & there[2:])
    at = np.argwhere(inside & border)  # never at the rim of the array, which was padded
    slope = np.stack(
        [field[tuple((at + e).T)] - field[tuple((at - e).T)] for e in np.eye(3, dtype=int)], axis=1
    ) / (2 * size)
    steep = np.maximum(np.linalg.norm(slope, axis=1, keepdims=True), 1e-12)
    normals = -slope / steep
    # to where the field is a half, between the cells
    out = (field[tuple(at.T)][:, None] - 0.5) / steep
    return Surface(
        (at + 0.5) * size + (first - 2 * step) * voxel + normals * np.minimum(out, size.min()),
        normals,
    )


def _slopes(blocks: int, repeat: int) -> np.ndarray:
    """Return how much of every block is in every cell, (blocks * repeat, blocks): each block is so
    many equal cells, which a Gaussian makes smooth.
    """
    stairs = np.repeat(np.eye(blocks, dtype=np.float32), repeat, axis=0)
    return ndimage.gaussian_filter1d(stairs, max(0.5 * repeat, 0.8), axis=0, truncate=3)


def view(azimuth: float, elevation: float = 25.0) -> np.ndarray:
    """Return how the reader looks at a volume: down at an angle, with the first section on top and
    nothing mirrored.

    Args:
        azimuth: of the axis right, in degrees from x to y.
        elevation: in degrees; at 90 the reader sees the sections as they are printed.

    Returns:
        (3, 3): the directions right, up and away from the reader as rows.

    >>> view(0, 90).round().astype(int).tolist()
    [[0, 0, 1], [0, -1, 0], [1, 0, 0]]
    """
    a, e = np.radians([azimuth, elevation])
    right = np.array([0, np.sin(a), np.cos(a)])
    away = np.array([np.sin(e), -np.cos(e) * np.cos(a), np.cos(e) * np.sin(a)])
    return np.stack([right, np.cross(away, right), away])


def render(
    surfaces: list[tuple[Surface, np.ndarray]],
    axes: np.ndarray,
    frame: tuple[float, ...],
    pixel: float,
    cell: float,
) -> np.ndarray:
    """Draw surfaces as they are seen from far away.

    Args:
        surfaces: each with its colour, RGB.
        axes: of `view`.
        frame: left, right, bottom, top of the picture in nm along the directions right and up.
        pixel: side of a pixel in nm.
        cell: distance of neighbouring points in nm.

    Returns:
        (rows, columns, 4) in [0, 1], first row on top, transparent where there is nothing.
    """
    left, end, bottom, top = frame
    fine = pixel / 2  # two by two make a pixel: smooth edges
    shape = 2 * int(np.ceil((top - bottom) / pixel)), 2 * int(np.ceil((end - left) / pixel))
    right, up, away = axes
    points = np.concatenate([one.points for one, _ in surfaces])
    normals = np.concatenate([one.normals for one, _ in surfaces])
    owner = np.repeat(np.arange(len(surfaces)), [len(one.points) for one, _ in surfaces])
    front = np.flatnonzero(normals @ away < 0)
    # the nearest last: what is drawn last stays
    front = front[np.argsort(-(points[front] @ away), kind="stable")]
    half = int(np.ceil(0.9 * cell / fine))  # of a square: no holes, whatever the slope
    # Around the picture is room for points whose squares reach into it.
    row = np.floor((top - points[front] @ up) / fine).astype(int) + half
    column = np.floor((points[front] @ right - left) / fine).astype(int) + half
    order = np.zeros((shape[0] + 2 * half, shape[1] + 2 * half), np.int32)
    valid = (row >= 0) & (row < order.shape[0]) & (column >= 0) & (column < order.shape[1])
    order[row[valid], column[valid]] = 1 + np.flatnonzero(valid)  # the nearer, the larger
    order = ndimage.maximum_filter(order, 2 * half + 1)[half:-half, half:-half]
    nearest, depth = np.append(-1, front)[order], np.zeros(shape)
    # squares stand out over the edge
    seen = ndimage.minimum_filter(nearest >= 0, 2 * half + 1)
    out = np.zeros((*shape, 4))
    if seen.any():
        depth[seen] = points[nearest[seen]] @ away
        near, far = depth[seen].min(), depth[seen].max()
        depth[~seen] = far
        hollow = (depth - ndimage.gaussian_filter(depth, 12))[seen] / (0.15 * (end - left))
        outline = (ndimage.maximum_filter(depth, 3) - depth)[seen] > 6 * cell
        nearest, depth = nearest[seen], depth[seen]
        light = np.clip(normals[nearest] @ (LIGHT / np.linalg.norm(LIGHT) @ axes), 0, 1)
        shade = 0.42 + 0.58 * light
        shade *= 1 - 0.45 * np.clip(hollow, 0, 1)  # less light where the surroundings are nearer
        shade[outline] *= 0.55
        colours = np.array([colour for _, colour in surfaces])[owner[nearest]]
        rgb = np.clip(colours * shade[:, None] + 0.18 * light[:, None] ** 24, 0, 1)
        haze = 0.35 * (depth - near) / max(far - near, 1e-12)  # what is far is pale
        out[seen, :3] = rgb + (1 - rgb) * haze[:, None]
        out[seen, 3] = 1
    out = out.reshape(shape[0] // 2, 2, shape[1] // 2, 2, 4).mean(axis=(1, 3))
    out[..., :3] /= np.maximum(out[..., 3:], 1e-12)
    return out
