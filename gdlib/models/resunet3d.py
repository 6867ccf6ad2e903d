"""Residual U-Net in 3D for anisotropic volumes: a modern alternative to MALA that pads, so that no
context is lost.
"""

from gdlib.limits import Count
from gdlib.models.resunet import ResUNet

__all__ = ["ResUNet3D"]


class ResUNet3D(ResUNet):
    """`ResUNet` with a third axis, coarse in z.

    At full resolution, where a voxel is several times as long in z as in y and x, convolutions stay
    within the section; they are 3x3x3 below. Sections are pooled once, where voxels have become
    about isotropic.

    Args:
        widths: see `ResUNet`.
        in_channels: see `ResUNet`.
        embedding_dim: see `ResUNet`.
        pooled_skips: see `ResUNet`.

    Reference: Lee et al., Superhuman accuracy on the SNEMI3D connectomics challenge, arXiv
        1706.00120, for in-plane convolutions and pooling at the top.
    """

    ndim = 3
    pools = ((1, 2, 2), (1, 2, 2), (2, 2, 2), (1, 2, 2))
    divisor = (2, 16, 16)
    kernels = ((1, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3))
    remainder = margin = (0, 0, 0)
    vectors_by = "embedding"

    def __init__(
        self,
        *,
        widths: tuple[Count, Count, Count, Count, Count] = (4, 8, 16, 32, 64),
        in_channels: Count = 1,
        embedding_dim: Count = 16,
        pooled_skips: bool = False,
    ) -> None:
        super().__init__(
            widths=widths,
            in_channels=in_channels,
            embedding_dim=embedding_dim,
            pooled_skips=pooled_skips,
        )
