"""Rematerialisation: the same numbers from less memory."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mrcnn_jax.config.heads import BoxHeadConfig, MaskHeadConfig
from mrcnn_jax.config.model import ModelConfig, ResNetConfig, RPNConfig
from mrcnn_jax.models.initialise import initialise
from mrcnn_jax.models.mask_rcnn import MaskRCNN, example_batch
from mrcnn_jax.models.resnet import ResNet
from mrcnn_jax.runtime import compiler_options

CANVAS = (128, 128)
MODEL = ModelConfig(
    fpn_channels=8,
    resnet=ResNetConfig(depth=34, width=4),
    rpn=RPNConfig(proposals=4),
    mask_head=MaskHeadConfig(channels=8),
)
C4 = replace(
    MODEL,
    backbone="c4",
    box_head=BoxHeadConfig(fcs=0, pool_size=4),
    mask_head=replace(MODEL.mask_head, convs=0),
)


@pytest.mark.parametrize(("depth", "norm"), [(34, "frozen"), (10, "live")])
def test_losses_gradients_and_statistics_are_the_same_and_memory_falls(
    depth: Any, norm: Any
) -> None:
    """Remat keeps the inputs of a ResNet-34's 16 blocks; the plain form also what is inside."""
    config = ResNetConfig(depth=depth, width=8, norm=norm)
    images = np.random.default_rng(0).normal(size=(2, 160, 160, 3)).astype(np.float32)
    variables = initialise(ResNet(config), images, seed=0)
    options = (compiler_options("cpu") or {}) | {"xla_backend_optimization_level": 0}
    results, temporaries = [], []
    for remat in (False, True):
        model = ResNet(config, remat=remat)

        def loss(params: Any, model: ResNet = model) -> Any:
            maps, updated = model.apply(
                {**variables, "params": params}, images, live=True, mutable=["batch_stats"]
            )
            return sum(jnp.sum(jnp.square(m)) for m in jax.tree.leaves(maps)), updated

        program = (
            jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=options)
            .lower(variables["params"])
            .compile()
        )
        results.append(program(variables["params"]))
        temporaries.append(program.memory_analysis().temp_size_in_bytes)
    ((plain, statistics), gradients), ((other, other_statistics), other_gradients) = results
    np.testing.assert_allclose(other, plain, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        other_statistics,
        statistics,
    )
    for ours, expected in zip(
        jax.tree.leaves(other_gradients), jax.tree.leaves(gradients), strict=True
    ):
        np.testing.assert_allclose(
            ours, expected, rtol=1e-3, atol=1e-4 * float(jnp.abs(expected).max())
        )
    assert temporaries[1] < (0.75 if depth == 34 else 1.0) * temporaries[0]


@pytest.mark.parametrize("config", [MODEL, C4], ids=["fpn", "c4"])
def test_the_switch_reaches_every_block_and_leaves_the_parameters(config: ModelConfig) -> None:
    batch = example_batch(CANVAS)
    plain, other = (MaskRCNN(replace(config, remat=remat)) for remat in (False, True))
    shapes, expected = (
        jax.eval_shape(lambda m=model: m.init(jax.random.key(0), batch)) for model in (other, plain)
    )
    assert shapes == expected

    def blocks(model: MaskRCNN) -> int:
        return len(
            re.findall(
                r"= (?:remat2?|checkpoint)\[", str(jax.make_jaxpr(model.apply)(shapes, batch))
            )
        )

    assert blocks(plain) == 0
    assert blocks(other) == 16 + (
        3 if config.backbone == "c4" else 0
    )  # C4: layer1..3 once, res5 on the RoIs of both heads
