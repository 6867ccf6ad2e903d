"""Augmentation in torch, for 2D and 3D alike: all geometry in one resampling, all intensity changes in one pass.

Labels are resampled with the same coordinates as the image, to the nearest pixel, so that targets made afterwards are exact.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor


def _uniform(low: float, high: float, shape: Sequence[int], generator: Generator) -> Tensor:
    return low + (high - low) * torch.rand(*shape, generator=generator)


def sampling_grid(
    shapes: Tensor,
    patch: Sequence[int],
    generator: Generator,
    *,
    flip: bool = True,
    rotate90: bool = True,
    scale: tuple[float, float] = (1.0, 1.0),
    elastic: float = 0.0,
    elastic_spacing: int = 32,
    probability: float = 1.0,
) -> Tensor:
    """Draw where in its image every pixel of every patch comes from.

    Args:
        shapes: (B, n) side lengths of the images, n = 2 or 3.
        patch: n side lengths of the patch.
        generator: source of randomness (CPU).
        flip: mirror each axis with probability 1/2.
        rotate90: turn by a multiple of 90 degrees in the last two axes (by 180 where the patch is not square).
        scale: range of the zoom factor in the last two axes; log-uniform. A factor of 2 shows objects twice as large.
        elastic: standard deviation, in pixels, of a smooth random displacement in the last two axes.
        elastic_spacing: pixels between its control points.
        probability: with which a patch gets zoom and displacement at all; the others are exact copies of pixels.

    Returns:
        (B, *patch, n) float32 pixel coordinates in array order.
    """
    batch, ndim = shapes.shape
    centred = [torch.arange(p, dtype=torch.float32) - (p - 1) / 2 for p in patch]
    grid = torch.stack(torch.meshgrid(*centred, indexing="ij"), -1).expand(batch, *patch, ndim).clone()
    per_patch = (batch,) + (1,) * ndim
    deform = torch.rand(batch, generator=generator) < probability

    factor = torch.exp(_uniform(math.log(scale[0]), math.log(scale[1]), (batch,), generator))
    factor = torch.where(deform, factor, 1.0).reshape(*per_patch, 1)
    grid[..., -2:] /= factor
    if elastic > 0:
        knots = [math.ceil(p / elastic_spacing) + 3 for p in patch[-2:]]
        field = torch.randn(batch, 2, *knots, generator=generator) * elastic * deform.reshape(batch, 1, 1, 1)
        fine = [(k - 3) * elastic_spacing for k in knots]
        field = F.interpolate(field, size=[n + 3 * elastic_spacing for n in fine], mode="bicubic", align_corners=True)
        start = elastic_spacing
        field = field[..., start : start + patch[-2], start : start + patch[-1]].movedim(1, -1)
        grid[..., -2:] += field.reshape(batch, *(1,) * (ndim - 2), *field.shape[1:])
    if flip:
        sign = torch.randint(2, (*per_patch, ndim), generator=generator) * 2.0 - 1
        grid *= sign
    if rotate90:
        step = 1 if patch[-1] == patch[-2] else 2
        turns = step * torch.randint(4 // step, (*per_patch, 1), generator=generator)
        sign = 1.0 - 2 * torch.cat([turns >= 2, (turns == 1) | (turns == 2)], -1)
        grid[..., -2:] = torch.where(turns % 2 == 1, grid[..., -2:].flip(-1), grid[..., -2:]) * sign

    # Place the patch so that, before zoom and displacement, it lies inside the image.
    size = torch.tensor(patch)
    room = (shapes - size).clamp(min=0)
    corner = (torch.rand(batch, ndim, generator=generator) * (room + 1)).floor()
    centre = corner + (size - 1) / 2
    return grid + centre.reshape(*per_patch, ndim)


def sample_patch(image: Tensor, label: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
    """Resample one image and its label.

    Args:
        image: (C, *shape) float32.
        label: (*shape) integer.
        grid: (*patch, n) from `sampling_grid`; coordinates outside are mirrored at the border.

    Returns:
        image (C, *patch), linear interpolation; label (*patch), nearest pixel.
    """
    shape = torch.tensor(label.shape, device=grid.device)
    last = (shape - 1).float()
    grid = (grid.abs() % (2 * last).clamp(min=1)).minimum(last * 2)
    grid = torch.where(grid > last, 2 * last - grid, grid)
    # grid_sample wants (x, y, [z]) in [-1, 1].
    unit = (grid / last.clamp(min=1) * 2 - 1).flip(-1)
    patch = F.grid_sample(image[None], unit[None], mode="bilinear", padding_mode="border", align_corners=True)[0]
    nearest = grid.round().long()
    return patch, label[tuple(nearest.unbind(-1))]


def augment_intensity(
    image: Tensor,
    generator: Generator,
    *,
    contrast: float = 0.0,
    brightness: float = 0.0,
    gamma: float = 0.0,
    blur: float = 0.0,
    noise: float = 0.0,
    probability: float = 0.5,
) -> Tensor:
    """Change the intensities of each patch at random; every change happens with the same probability, independently.

    Args:
        image: (B, C, [Z,] Y, X) float32, roughly in [0, 1].
        generator: source of randomness (CPU).
        contrast: factor from [1 - contrast, 1 + contrast].
        brightness: shift from [-brightness, brightness].
        gamma: exponent from [2^-gamma, 2^gamma], on the part of the values in [0, 1].
        blur: largest standard deviation, in pixels, of a Gaussian blur in the last two axes.
        noise: largest standard deviation of Gaussian noise.
        probability: of each change.
    """
    batch = len(image)
    column = (batch,) + (1,) * (image.ndim - 1)
    device = image.device

    def draw(low: float, high: float, neutral: float) -> Tensor:
        value = _uniform(low, high, (batch,), generator)
        use = torch.rand(batch, generator=generator) < probability
        return torch.where(use, value, neutral).reshape(column).to(device)

    if gamma > 0:
        exponent = 2 ** draw(-gamma, gamma, 0.0)
        inner = image.clamp(0, 1)
        image = image + inner.clamp(min=1e-6) ** exponent - inner
    if blur > 0:
        image = _blur(image, draw(0.0, blur, 0.0).flatten())
    image = image * draw(1 - contrast, 1 + contrast, 1.0) + draw(-brightness, brightness, 0.0)
    if noise > 0:
        normal = torch.randn(image.shape, generator=generator).to(device)
        image = image + normal * draw(0.0, noise, 0.0)
    return image


def _blur(image: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur in the last two axes with one sigma per patch; 0 leaves a patch as it is."""
    radius = max(1, math.ceil(3 * float(sigma.max())))
    x = torch.arange(-radius, radius + 1, device=image.device)
    kernel = torch.exp(-0.5 * (x / sigma.clamp(min=0.05)[:, None]) ** 2)
    kernel = kernel / kernel.sum(1, keepdim=True)
    planes = image.shape[1:-2].numel()
    flat = image.reshape(1, -1, *image.shape[-2:])
    kernel = kernel.repeat_interleave(planes, 0)[:, None]
    flat = F.pad(flat, (radius,) * 4, mode="reflect")
    flat = F.conv2d(flat, kernel[:, :, :, None], groups=flat.shape[1])
    flat = F.conv2d(flat, kernel[:, :, None, :], groups=flat.shape[1])
    return flat.reshape(image.shape)
