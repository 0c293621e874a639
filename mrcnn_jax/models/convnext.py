"""ConvNeXt backbone (Liu et al. 2022): blocks of a 7x7 depthwise convolution and two layers."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float, Float32, Int32, PRNGKeyArray

from mrcnn_jax.config.model import ConvNeXtConfig
from mrcnn_jax.models.convolution import depthwise_conv2d, xla_conv2d
from mrcnn_jax.models.layers import Pointwise, add_bias, cell_mask

EPSILON = 1e-6  # of every layer norm
_normal = nn.initializers.normal(0.02)  # the authors cut it, but at 100 standard deviations


@jax.custom_vjp
def gelu(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """Returns x Phi(x), by the error function; computed in float32.

    The backward pass keeps the input alone, in its dtype.
    """
    wide = x.astype(jnp.float32)
    return (wide * _normal_cdf(wide)).astype(x.dtype)


def _gelu_forward(x: Array) -> tuple[Array, Array]:
    return gelu(x), x


def _gelu_backward(x: Array, cotangent: Array) -> tuple[Array]:
    wide = x.astype(jnp.float32)
    density = jnp.exp(-0.5 * jnp.square(wide)) * (2 * jnp.pi) ** -0.5
    slope = _normal_cdf(wide) + wide * density
    return ((cotangent.astype(jnp.float32) * slope).astype(x.dtype),)


gelu.defvjp(_gelu_forward, _gelu_backward)


def _normal_cdf(x: Float32[Array, "*s"]) -> Float32[Array, "*s"]:
    return 0.5 * (1.0 + jax.lax.erf(x * 0.5**0.5))


def _layer_norm(x: Float[Array, "b h w c"], dtype: Dtype, name: str) -> Float[Array, "b h w c"]:
    """Layer norm of each cell's channels, in float32; call it inside a module's `nn.compact`."""
    # Flax's fast variance, E[x^2] - E[x]^2, would cancel where the mean is large.
    norm = nn.LayerNorm(EPSILON, use_fast_variance=False, name=name)
    return norm(x.astype(jnp.float32)).astype(dtype)


class PatchConv(nn.Module):
    """Convolution with as large a stride as its kernel, and a layer norm before or after it.

    Parameters: `kernel` (HWIO), `bias`, `norm`. Both sides of the input are multiples of `size`.
    """

    channels: int
    size: int
    norm_first: bool
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 {self.channels}"]:
        if self.norm_first:
            x = _layer_norm(x, self.dtype, "norm")
        shape = (self.size, self.size, x.shape[-1], self.channels)
        kernel = self.param("kernel", _normal, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.channels,), jnp.float32)
        x = xla_conv2d(
            x.astype(self.dtype), kernel.astype(self.dtype), strides=self.size, padding=(0, 0)
        )
        x = add_bias(x, bias)
        return x if self.norm_first else _layer_norm(x, self.dtype, "norm")


class Block(nn.Module):
    """Residual block: 7x7 depthwise convolution, layer norm, 1x1 to four times as wide, GELU, 1x1.

    The branch is multiplied by `gamma`, a factor per channel, before it is added.
    """

    layer_scale: float
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        mask: Bool[Array, "b h w 1"],
        factor: Float32[Array, "b 1 1 1"] | None,
    ) -> Float[Array, "b h w c"]:
        """Applies the block.

        Args:
            x: features, 0 where `mask` is False.
            mask: cells on an image; the result is 0 in the others.
            factor: on the branch of each image, of drop path; None: 1.
        """
        channels = x.shape[-1]
        kernel = self.param("kernel", _normal, (7, 7, 1, channels), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
        y = add_bias(depthwise_conv2d(x, kernel.astype(self.dtype)), bias)
        y = _layer_norm(y, self.dtype, "norm")
        y = gelu(Pointwise(4 * channels, _normal, dtype=self.dtype, name="expand")(y))
        y = Pointwise(channels, _normal, dtype=self.dtype, name="project")(y)
        scale = nn.initializers.constant(self.layer_scale)
        gamma = self.param("gamma", scale, (channels,), jnp.float32)
        branch = y.astype(jnp.float32) * gamma[None, None, None]
        if factor is not None:
            branch = branch * factor
        total = x.astype(jnp.float32) + branch
        return jnp.where(mask, total, 0.0).astype(self.dtype)


class Stage(nn.Module):
    """The blocks of one resolution; all but the first stage halve that of their input before.

    With `remat` the backward pass keeps only each block's input and recomputes the rest.
    """

    blocks: int
    channels: int
    downsample: bool
    layer_scale: float
    remat: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w i"],
        mask: Bool[Array, "b h2 w2 1"],
        factors: Sequence[Float32[Array, "b 1 1 1"] | None],
    ) -> Float[Array, "b h2 w2 {self.channels}"]:
        """Applies the stage; `mask` and `factors` (one per block) as of `Block`."""

        def run(block: Block, x: Array, mask: Array, factor: Array | None) -> Array:
            return block(x, mask, factor)

        if self.remat:
            run = nn.remat(run)
        if self.downsample:
            conv = PatchConv(self.channels, 2, norm_first=True, dtype=self.dtype, name="downsample")
            x = jnp.where(mask, conv(x), jnp.zeros((), self.dtype))
        for i in range(self.blocks):
            block = Block(self.layer_scale, self.dtype, name=f"block{i}")
            x = run(block, x, mask, factors[i])
        return x


class ConvNeXt(nn.Module):
    """Backbone: normalised images to four maps, each through a layer norm of its own.

    The norms of the maps are those of the authors' detectors (`norm0` .. `norm3` of the backbone in
    their object_detection folder); classifiers do not have them. Unlike there, the cells of the
    canvas's padding are set to 0 after the stem, each downsampling and each block: to its
    convolutions an image ends at its own sides as at those of the canvas, so that its features do
    not depend on the canvas; and the layer norms do not multiply the gradients of cells without any
    signal by up to 1 / sqrt(EPSILON) each.
    """

    config: ConvNeXtConfig
    remat: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        images: Float[Array, "b h w 3"],
        *,
        image_sizes: Int32[Array, "b 2"] | None = None,
        valid: Bool[Array, " b"] | None = None,
        keys: PRNGKeyArray | None = None,
    ) -> dict[str, Float[Array, "b _h _w _c"]]:
        """Computes feature maps.

        Args:
            images: normalised images; the padding of the canvas has to be zero, and both sides of
                the canvas multiples of 32.
            image_sizes: (height, width) in pixels; None: the whole canvas.
            valid: images that exist; None: all.
            keys: a key for each image, by which branches are left out (`drop_path`); None: none is.

        Returns:
            {"c2", "c3", "c4", "c5"} at strides 4, 8, 16, 32, in the compute dtype.
        """
        batch, *canvas, _ = images.shape
        if image_sizes is None:
            image_sizes = jnp.broadcast_to(jnp.array(canvas, jnp.int32)[None], (batch, 2))
        if valid is None:
            valid = jnp.ones((batch,), bool)
        config, features = self.config, {}
        factors = iter(drop_path_factors(config, keys))
        x = images
        for i, (blocks, channels) in enumerate(zip(config.blocks, config.channels, strict=True)):
            stride = 4 * 2**i
            mask = cell_mask(image_sizes, valid, stride, (canvas[0] // stride, canvas[1] // stride))
            if i == 0:
                x = PatchConv(channels, 4, norm_first=False, dtype=self.dtype, name="stem")(x)
                x = jnp.where(mask, x, jnp.zeros((), self.dtype))
            stage = Stage(
                blocks,
                channels,
                i > 0,
                config.layer_scale,
                self.remat,
                self.dtype,
                name=f"stage{i + 1}",
            )
            x = stage(x, mask, [next(factors) for _ in range(blocks)])
            features[f"c{i + 2}"] = _layer_norm(x, self.dtype, f"norm{i + 2}")
        return features


def drop_path_factors(
    config: ConvNeXtConfig, keys: PRNGKeyArray | None
) -> list[Float32[Array, "b 1 1 1"]] | list[None]:
    """What each block's branch is multiplied by: 0 where it is left out, else 1 / (its share kept).

    Args:
        keys: one for each image; None: no branch is left out, and every factor is None.
    """
    count = sum(config.blocks)
    if keys is None:
        return [None] * count
    rates = [config.drop_path * i / max(count - 1, 1) for i in range(count)]
    kept = 1.0 - jnp.array(rates, jnp.float32)[None]
    draw = functools.partial(jax.random.uniform, shape=(count,), dtype=jnp.float32)
    factors: Any = jnp.where(jax.vmap(draw)(keys) < kept, 1.0 / kept, 0.0)
    return [factors[:, i, None, None, None] for i in range(count)]
