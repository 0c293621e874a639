"""ResNet backbones (He et al. 2016), v1.5 (stride in the 3x3) and v1 (stride in the first 1x1)."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float, Int32

from mrcnn_jax.config.model import ResNetConfig
from mrcnn_jax.models.layers import ConvNorm, cell_mask, max_pool, relu


class ResNetBlocks(NamedTuple):
    """Kind and number of the residual blocks of a ResNet."""

    bottleneck: bool
    counts: tuple[int, int, int, int]  # of layer1..layer4


RESNET_BLOCKS: dict[int, ResNetBlocks] = {
    10: ResNetBlocks(False, (1, 1, 1, 1)),  # not in the paper: for tests and the demo
    18: ResNetBlocks(False, (2, 2, 2, 2)),
    34: ResNetBlocks(False, (3, 4, 6, 3)),
    50: ResNetBlocks(True, (3, 4, 6, 3)),
    101: ResNetBlocks(True, (3, 4, 23, 3)),
}
EXPANSION = 4  # output channels of a bottleneck, as a multiple of its 3x3's


class Block(nn.Module):
    """Residual block: two 3x3 convolutions, or a bottleneck of 1x1, 3x3 and 1x1.

    A bottleneck ends with EXPANSION times `channels`.
    """

    channels: int
    strides: int
    bottleneck: bool
    stride_in_1x1: bool
    epsilon: float = 1e-5
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w i"],
        *,
        live: bool,
        mask_in: Bool[Array, "b h w 1"] | None,
        mask_out: Bool[Array, "b h2 w2 1"] | None,
    ) -> Float[Array, "b h2 w2 o"]:
        def conv(
            name: str,
            x: Array,
            channels: int,
            size: int,
            strides: int,
            mask: Array | None,
            relu: bool = True,
        ) -> Array:
            return ConvNorm(
                channels, size, strides, relu, self.epsilon, dtype=self.dtype, name=name
            )(x, live=live, mask=mask)

        if self.bottleneck:
            out = self.channels * EXPANSION
            first, second = (self.strides, 1) if self.stride_in_1x1 else (1, self.strides)
            y = conv(
                "conv1", x, self.channels, 1, first, mask_out if self.stride_in_1x1 else mask_in
            )
            y = conv("conv2", y, self.channels, 3, second, mask_out)
            y = conv("conv3", y, out, 1, 1, mask_out, relu=False)
        else:
            out = self.channels
            y = conv("conv1", x, out, 3, self.strides, mask_out)
            y = conv("conv2", y, out, 3, 1, mask_out, relu=False)
        if self.strides != 1 or x.shape[-1] != out:
            x = conv("downsample", x, out, 1, self.strides, mask_out, relu=False)
        return relu(y + x.astype(y.dtype))


class Stage(nn.Module):
    """`blocks` residual blocks at one resolution (layer1 .. layer4); the first one strides.

    With `remat` the backward pass keeps only each block's input and recomputes the rest.
    """

    blocks: int
    channels: int
    strides: int
    bottleneck: bool
    stride_in_1x1: bool
    epsilon: float = 1e-5
    remat: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w i"],
        *,
        live: bool,
        mask_in: Bool[Array, "b h w 1"] | None,
        mask_out: Bool[Array, "b h2 w2 1"] | None,
    ) -> Float[Array, "b h2 w2 o"]:
        def run(block: Block, x: Array, mask_in: Array | None, mask_out: Array | None) -> Array:
            return block(x, live=live, mask_in=mask_in, mask_out=mask_out)

        if self.remat:
            run = nn.remat(run)
        for i in range(self.blocks):
            block = Block(
                channels=self.channels,
                strides=self.strides if i == 0 else 1,
                bottleneck=self.bottleneck,
                stride_in_1x1=self.stride_in_1x1,
                epsilon=self.epsilon,
                dtype=self.dtype,
                name=f"block{i}",
            )
            x = run(block, x, mask_in if i == 0 else mask_out, mask_out)
        return x


def resnet_stage(
    config: ResNetConfig, number: int, *, remat: bool = False, dtype: Dtype, name: str
) -> Stage:
    """Makes res2 .. res5, for `number` 2 .. 5."""
    bottleneck, counts = RESNET_BLOCKS[config.depth]
    i = number - 2
    return Stage(
        blocks=counts[i],
        channels=config.width * 2**i,
        strides=1 if i == 0 else 2,
        bottleneck=bottleneck,
        stride_in_1x1=config.stride_in_1x1,
        epsilon=config.norm_epsilon,
        remat=remat,
        dtype=dtype,
        name=name,
    )


class ResNet(nn.Module):
    """Backbone: normalised images to the maps of res2 up to `last`."""

    config: ResNetConfig
    last: int = 5
    remat: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        images: Float[Array, "b h w 3"],
        *,
        live: bool = False,
        image_sizes: Int32[Array, "b 2"] | None = None,
        valid: Bool[Array, " b"] | None = None,
    ) -> dict[str, Float[Array, "b _h _w _c"]]:
        """Computes feature maps.

        Args:
            images: normalised images; the padding of the canvas has to be zero.
            live: normalise by batch statistics, if the config's norm is "live" too. They are taken
                over the cells on valid images.
            image_sizes: (height, width) in pixels; None: the whole canvas.
            valid: images that exist; None: all.

        Returns:
            {"c2", "c3", "c4", "c5"}, up to `last`, at strides 4, 8, 16, 32 (sizes rounded up), in
            the compute dtype.
        """
        batch, *canvas, _ = images.shape
        live = live and self.config.norm == "live"
        if image_sizes is None:
            image_sizes = jnp.broadcast_to(jnp.array(canvas, jnp.int32)[None], (batch, 2))
        if valid is None:
            valid = jnp.ones((batch,), bool)
        # Unused (and removed by the compiler) unless live.
        masks = {
            s: cell_mask(image_sizes, valid, s, (-(-canvas[0] // s), -(-canvas[1] // s)))
            for s in (2, 4, 8, 16, 32)
        }

        stem = ConvNorm(
            self.config.width, 7, 2, epsilon=self.config.norm_epsilon, dtype=self.dtype, name="stem"
        )
        x = max_pool(stem(images, live=live, mask=masks[2]))
        features = {}
        for number in range(2, self.last + 1):
            layer = resnet_stage(
                self.config, number, remat=self.remat, dtype=self.dtype, name=f"layer{number - 1}"
            )
            stride = 2**number
            x = layer(x, live=live, mask_in=masks[stride // layer.strides], mask_out=masks[stride])
            features[f"c{number}"] = x
        return features
