"""Feature pyramid network (Lin et al. 2017)."""

from __future__ import annotations

import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Float

from mrcnn_jax.config.heads import Norm
from mrcnn_jax.models.layers import Conv3x3, ConvNorm, Pointwise


def upsample_nearest(
    x: Float[Array, "b h w c"], size: tuple[int, int]
) -> Float[Array, "b h2 w2 c"]:
    """Repeats each cell 2x2 and cuts the result to `size` = (h2, w2), at most (2h, 2w).

    By broadcast and reshape: on a CPU the gradient of `jax.image.resize` is many times slower.
    """
    b, h, w, c = x.shape
    doubled = jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(
        b, 2 * h, 2 * w, c
    )
    return doubled[:, : size[0], : size[1]]


class FPN(nn.Module):
    """Adds coarse semantic features to finer maps, from the top down.

    1x1 lateral convolutions, nearest upsampling, 3x3 output convolutions.
    """

    channels: int = 256
    norm: Norm = "none"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, features: dict[str, Float[Array, "b _h _w _c"]]
    ) -> dict[str, Float[Array, "b _h _w {self.channels}"]]:
        """Maps {"c2".."c5"} at strides 4..32 to {"p2".."p6"} at strides 4..64.

        Each map has twice as many cells per axis as the next coarser one, or one less (odd sizes).
        P6 is every second cell of P5.
        """

        def conv(x: Array, size: int, name: str) -> Array:
            if self.norm == "frozen_batch":
                return ConvNorm(self.channels, size, relu=False, dtype=self.dtype, name=name)(
                    x, live=False
                )
            xavier = nn.initializers.xavier_uniform()
            layer = Pointwise if size == 1 else Conv3x3
            return layer(self.channels, xavier, dtype=self.dtype, name=name)(x)

        pyramid: dict[str, Array] = {}
        top = None
        for level in (5, 4, 3, 2):
            merged = conv(features[f"c{level}"], 1, f"lateral{level}")
            if top is not None:
                merged = merged + upsample_nearest(top, (merged.shape[1], merged.shape[2]))
            pyramid[f"p{level}"] = conv(merged, 3, f"output{level}")
            top = merged
        pyramid["p6"] = pyramid["p5"][:, ::2, ::2]
        return {f"p{level}": pyramid[f"p{level}"] for level in (2, 3, 4, 5, 6)}
