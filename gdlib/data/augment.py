"""Augmentation in torch, for 2D and 3D alike: all geometry in one resampling, all intensity changes
in one pass.

Labels are resampled with the same coordinates as the image, to the nearest pixel, so that targets
made afterwards are exact.
"""

import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from gdlib import devices


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
    rotate: float = 0.0,
    misalign: float = 0.0,
    probability: float = 1.0,
    margin: Sequence[int] | None = None,
) -> Tensor:
    """Draw where in its image every pixel of every patch comes from.

    Args:
        shapes: (B, n) side lengths of the images, n = 2 or 3.
        patch: n side lengths of the patch, without the margin.
        generator: source of randomness (CPU).
        flip: mirror each axis with probability 1/2.
        rotate90: turn by a multiple of 90 degrees in the last two axes (by 180 where the patch is
            not square).
        scale: range of the zoom factor in the last two axes; log-uniform. A factor of 2 shows
            objects twice as large.
        elastic: standard deviation, in pixels, of a smooth random displacement in the last two
            axes.
        elastic_spacing: pixels between its control points.
        rotate: largest angle, in degrees, of a turn in the last two axes.
        misalign: largest displacement, in pixels, of one section or of all sections from one on;
            volumes only.
        probability: with which a patch gets zoom, turn, displacement and, on its own, misalignment
            at all; the others are exact copies of pixels.
        margin: pixels more on each side of the patch; they may lie outside of the image.

    Returns:
        (B, *patch + 2 margin, n) float32 pixel coordinates in array order.
    """
    batch, ndim = shapes.shape
    size = torch.tensor(patch)
    if margin is not None:
        patch = [p + 2 * m for p, m in zip(patch, margin, strict=True)]
    per_patch = (batch,) + (1,) * ndim
    # One coordinate of all pixels, ([B,] *patch), for each axis; sides of 1 where it does not
    # change along them yet.
    *z, y, x = (
        (torch.arange(p, dtype=torch.float32) - (p - 1) / 2).reshape(
            [-1 if k == axis else 1 for k in range(ndim)]
        )
        for axis, p in enumerate(patch)
    )
    deform = torch.rand(batch, generator=generator) < probability

    factor = torch.exp(_uniform(math.log(scale[0]), math.log(scale[1]), (batch,), generator))
    factor = torch.where(deform, factor, 1.0).reshape(per_patch)
    y, x = y / factor, x / factor
    if rotate > 0:
        angle = _uniform(-rotate, rotate, (batch,), generator) * deform * math.pi / 180
        sine, cosine = (f(angle).reshape(per_patch) for f in (torch.sin, torch.cos))
        y, x = cosine * y - sine * x, sine * y + cosine * x
    if elastic > 0:
        knots = [math.ceil(p / elastic_spacing) + 3 for p in patch[-2:]]
        field = (
            torch.randn(batch, 2, *knots, generator=generator)
            * elastic
            * deform.reshape(batch, 1, 1, 1)
        )
        field = _enlarged(field, elastic_spacing, patch[-2:]).reshape(
            batch, 2, *(1,) * (ndim - 2), *patch[-2:]
        )
        y, x = y + field[:, 0], x + field[:, 1]
    if misalign > 0 and ndim == 3:
        shift = _misalignment(batch, patch[0], misalign, probability, generator).reshape(
            batch, -1, 1, 1, 2
        )
        y, x = y + shift[..., 0], x + shift[..., 1]
    if flip:
        sign = torch.randint(2, (*per_patch, ndim), generator=generator) * 2.0 - 1
        *z, y, x = (place * sign[..., axis] for axis, place in enumerate((*z, y, x)))
    if rotate90:
        step = 1 if patch[-1] == patch[-2] else 2
        turns = step * torch.randint(4 // step, per_patch, generator=generator)
        odd = turns % 2 == 1
        y, x = torch.where(odd, x, y), torch.where(odd, y, x)
        y, x = y * (1.0 - 2 * (turns >= 2)), x * (1.0 - 2 * ((turns == 1) | (turns == 2)))

    # Place the patch so that, before zoom and displacement, it lies inside the image.
    room = (shapes - size).clamp(min=0)
    corner = (torch.rand(batch, ndim, generator=generator) * (room + 1)).floor()
    centre = (corner + (size - 1) / 2).reshape(*per_patch, ndim)
    return _joined(
        (place + centre[..., axis]).expand(batch, *patch) for axis, place in enumerate((*z, y, x))
    )


def _joined(places: Iterable[Tensor]) -> Tensor:
    """Coordinates as one tensor (..., n), in memory one axis after the other: what follows works on
    one at a time.
    """
    return torch.stack(list(places)).movedim(0, -1)


def _enlarged(field: Tensor, spacing: int, patch: Sequence[int]) -> Tensor:
    """Smooth field (B, 2, Y, X) through control points (B, 2, K, L) that are about `spacing` pixels
    apart.

    Bicubic, in one product of matrices for each axis: this is a part of an image that would be
    several times as large.
    """
    for axis, p in ((-2, patch[0]), (-1, patch[1])):
        knots = field.shape[axis]
        # The response to each control point alone, along a line.
        response = torch.eye(knots)[:, None, None, :]
        fine = F.interpolate(
            response, size=[1, knots * spacing], mode="bicubic", align_corners=True
        )
        matrix = fine[:, 0, 0, spacing : spacing + p]  # (K, p)
        field = torch.tensordot(field, matrix, dims=([axis], [0])).movedim(-1, axis)
    return field


def _misalignment(
    batch: int, sections: int, most: float, probability: float, generator: Generator
) -> Tensor:
    """Whole pixels (B, Z, 2) by which sections are out of place: one section of a patch, or all
    from one on.
    """
    shift = _uniform(-most, most, (batch, 1, 2), generator).round()
    first = torch.randint(sections, (batch, 1), generator=generator)
    alone = torch.rand(batch, 1, generator=generator) < 0.5
    use = torch.rand(batch, 1, generator=generator) < probability
    z = torch.arange(sections)
    return shift * (torch.where(alone, z == first, z >= first) & use)[..., None]


def mirrored(grid: Tensor, shape: Sequence[int]) -> Tensor:
    """Mirror pixel coordinates (..., n) at the borders of an image of this shape, as often as
    needed.
    """
    return _joined(_mirrored(place, n - 1) for place, n in zip(grid.unbind(-1), shape, strict=True))


def _mirrored(place: Tensor, last: int) -> Tensor:
    low, high = place.aminmax()
    if low >= 0 and high <= last:  # as most patches are
        return place
    place = place.abs() % max(1, 2 * last)
    return torch.where(place > last, 2 * last - place, place).clamp(min=0)


def sample_patch(image: Tensor, grid: Tensor) -> Tensor:
    """Resample an image by linear interpolation.

    Args:
        image: (C, *shape) float32.
        grid: (*patch, n) pixel coordinates inside the image.

    Returns:
        (C, *patch) float32.
    """
    # grid_sample wants (x, y, [z]) in [-1, 1].
    unit = [
        place / max(1, n - 1) * 2 - 1
        for place, n in zip(grid.unbind(-1), image.shape[1:], strict=True)
    ]
    # As a batch of lines or sections, as a CPU computes several images at once but not parts of
    # one.
    unit = torch.stack(unit[::-1], -1)[:, None]
    images = image.expand(len(unit), *image.shape)
    parts = F.grid_sample(images, unit, mode="bilinear", padding_mode="border", align_corners=True)
    return parts[:, :, 0].movedim(0, 1)


def augment_intensity(
    image: Tensor,
    generator: Generator,
    *,
    contrast: float = 0.0,
    brightness: float = 0.0,
    gamma: float = 0.0,
    blur: float = 0.0,
    noise: float = 0.0,
    invert: float = 0.0,
    probability: float = 0.5,
) -> Tensor:
    """Change the intensities of each patch at random.

    Every change happens with the same probability, independently.

    Args:
        image: (B, C, [Z,] Y, X) float32, roughly in [0, 1].
        generator: source of randomness (CPU).
        contrast: factor from [1 - contrast, 1 + contrast].
        brightness: shift from [-brightness, brightness].
        gamma: exponent from [2^-gamma, 2^gamma], on the part of the values in [0, 1].
        blur: largest standard deviation, in pixels, of a Gaussian blur in the last two axes.
        noise: largest standard deviation of Gaussian noise.
        invert: probability that dark becomes bright and bright dark.
        probability: of each other change.
    """
    batch = len(image)
    column = (batch,) + (1,) * (image.ndim - 1)
    if invert > 0:
        negative = devices.send(
            (torch.rand(batch, generator=generator) < invert).reshape(column), image.device
        )
        image = torch.where(negative, 1 - image, image)

    def draw(low: float, high: float, neutral: float) -> Tensor:
        value = _uniform(low, high, (batch,), generator)
        use = torch.rand(batch, generator=generator) < probability
        return torch.where(use, value, neutral).reshape(column)

    if gamma > 0:
        exponent = devices.send(2 ** draw(-gamma, gamma, 0.0), image.device)
        inner = image.clamp(0, 1)
        image = image + inner.clamp(min=1e-6) ** exponent - inner
    if blur > 0:
        image = _blur(image, draw(0.0, blur, 0.0).flatten())
    factor, shift = draw(1 - contrast, 1 + contrast, 1.0), draw(-brightness, brightness, 0.0)
    image = image * devices.send(factor, image.device) + devices.send(shift, image.device)
    if noise > 0:
        normal = torch.randn(image.shape, generator=generator)
        image = image + devices.send(normal, image.device) * devices.send(
            draw(0.0, noise, 0.0), image.device
        )
    return image


def empty_patches(
    shape: Sequence[int],
    generator: Generator,
    *,
    lower: float,
    upper: float,
    contrast: Sequence[float] | None = None,
    level: Sequence[float] | None = None,
    spread: Sequence[float] | None = None,
) -> Tensor:
    """Draw patches of images without objects, as networks see them: noise on an even or sloping
    ground.

    Their range is from none of what images with objects have to all of it: an image of noise that
    is smooth from pixel to pixel, after a filter or a lossy compression, is stretched more than
    `intensity_range` means to.

    Args:
        shape: (B, C, [Z,] Y, X).
        generator: source of randomness (CPU).
        lower: percentile that would become 0 in an image that is stretched to the full range.
        upper: percentile that would become 1.
        contrast: not used; with it and `spread`, these are the keyword arguments of
            `intensity_range`.
        level: for each channel, where the background is; 0 if left out.
        spread: not used.

    Returns:
        (B, C, [Z,] Y, X) float32.
    """
    batch, channels, *sides = shape
    column = (batch,) + (1,) * (len(shape) - 1)
    noise = torch.randn(*shape, generator=generator)
    noise = _blur(noise, _uniform(0.0, 1.5, (batch,), generator))
    noise = noise / noise.flatten(1).std(1).reshape(column)
    for axis in (-2, -1):
        slope = _uniform(-1.5, 1.5, column, generator)
        place = torch.linspace(-1, 1, sides[axis])
        noise = noise + slope * (place if axis == -1 else place[:, None])
    flat = noise.flatten(2)
    low, high = (
        flat.kthvalue(1 + round(percent / 100 * (flat.shape[-1] - 1)), -1).values.reshape(
            batch, channels, *column[2:]
        )
        for percent in (lower, upper)
    )
    share = _uniform(0.0, 1.0, column, generator) ** 2  # small ones more often, as they are
    ground = torch.tensor(level or [0.0] * channels).reshape(1, channels, *column[2:])
    return ground * (1 - share) + share * (noise - low) / (high - low)


def augment_sections(
    image: Tensor,
    generator: Generator,
    *,
    contrast: float = 0.0,
    brightness: float = 0.0,
    blur: float = 0.0,
    motion: int = 0,
    missing: float = 0.0,
    probability: float = 0.1,
) -> Tensor:
    """Change sections of a volume at random, each on its own, as the microscope and the knife do.

    Args:
        image: (B, C, Z, Y, X) float32, roughly in [0, 1].
        generator: source of randomness (CPU).
        contrast: factor from [1 - contrast, 1 + contrast], for every section.
        brightness: shift from [-brightness, brightness], for every section.
        blur: largest standard deviation, in pixels, of a Gaussian blur.
        motion: longest motion blur, in pixels, along y, x or a diagonal; below 2, there is none.
        missing: probability that a section is lost: it becomes one grey.
        probability: that a section is blurred, and that it is motion-blurred.
    """
    batch, channels, sections = image.shape[:3]
    device = image.device
    column = (batch, 1, sections, 1, 1)

    # What happens is decided on the CPU, where it is drawn: nothing waits for the device.
    def draw(low: float, high: float) -> Tensor:
        return _uniform(low, high, column, generator)

    def chance(p: float) -> Tensor:
        return torch.rand(column, generator=generator) < p

    factor, shift = draw(1 - contrast, 1 + contrast), draw(-brightness, brightness)
    image = image * devices.send(factor, device) + devices.send(shift, device)
    if blur > 0:
        sigma = (draw(0.0, blur) * chance(probability)).expand(batch, channels, sections, 1, 1)
        if sigma.any():
            image = _blur(image.flatten(0, 2)[:, None], sigma.flatten()).reshape(image.shape)
    if motion > 1:
        for at in chance(probability).flatten().nonzero()[:, 0].tolist():
            length = int(torch.randint(2, motion + 1, (), generator=generator))
            diagonal, straight = torch.eye(length), torch.ones(length, 1)
            lines = (straight, straight.T, diagonal, diagonal.flip(0))
            kernel = devices.send(
                lines[int(torch.randint(4, (), generator=generator))] / length, device
            )
            height, width = kernel.shape
            section = image[at // sections, :, at % sections, None]
            border = ((width - 1) // 2, width // 2, (height - 1) // 2, height // 2)
            section = F.conv2d(F.pad(section, border, mode="replicate"), kernel[None, None])
            image[at // sections, :, at % sections] = section[:, 0]
    if missing > 0:
        image = torch.where(
            devices.send(chance(missing), device), devices.send(draw(0.0, 1.0), device), image
        )
    return image


def _blur(image: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur in the last two axes with one sigma per patch, known on the CPU.

    0 leaves a patch as it is.
    """
    which = sigma.nonzero()[:, 0]
    if not len(which):
        return image
    radius = max(1, math.ceil(3 * float(sigma.max())))
    x = torch.arange(-radius, radius + 1)
    kernel = torch.exp(-0.5 * (x / sigma[which].clamp(min=0.05)[:, None]) ** 2)
    kernel = kernel / kernel.sum(1, keepdim=True)
    planes = image.shape[1:-2].numel()
    kernel = devices.send(kernel, image.device).repeat_interleave(planes, 0)[:, None]
    which = devices.send(which, image.device)
    flat = image[which].reshape(1, -1, *image.shape[-2:])
    flat = F.pad(flat, (radius,) * 4, mode="reflect")
    flat = F.conv2d(flat, kernel[:, :, :, None], groups=flat.shape[1])
    flat = F.conv2d(flat, kernel[:, :, None, :], groups=flat.shape[1])
    return image.index_copy(0, which, flat.reshape(len(which), *image.shape[1:]))
