"""U-Net for processors in 3D, for anisotropic volumes."""

from gdlib.limits import Count
from gdlib.models.leanunet import LeanUNet

__all__ = ["LeanUNet3D"]


class LeanUNet3D(LeanUNet):
    """`LeanUNet` with a third axis, coarse in z, with the kernels and pools of `ResUNet3D`.

    Args:
        widths: see `LeanUNet`.
        in_channels: see `LeanUNet`.
        embedding_dim: see `LeanUNet`.
    """

    ndim = 3
    pools = ((1, 2, 2), (1, 2, 2), (2, 2, 2), (1, 2, 2))
    divisor = (2, 16, 16)
    kernels = ((1, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3))
    remainder = margin = (0, 0, 0)
    vectors_by = "embedding"

    def __init__(
        self,
        *,
        widths: tuple[Count, Count, Count, Count, Count] = (8, 8, 24, 48, 64),
        in_channels: Count = 1,
        embedding_dim: Count = 16,
    ) -> None:
        super().__init__(widths=widths, in_channels=in_channels, embedding_dim=embedding_dim)
