"""One compiled call a stage and canvas: losses, gradients of what the stage trains, the update."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, PRNGKeyArray

from mrcnn_jax.config.schema import Loss, StageConfig
from mrcnn_jax.models.box_head import box_loss, box_samples
from mrcnn_jax.models.mask_head import (
    mask_loss,
    mask_samples,
    point_loss,
    point_samples,
    true_class,
)
from mrcnn_jax.models.mask_rcnn import MaskRCNN, Variables, select_proposals
from mrcnn_jax.models.rpn import pyramid_anchors, rpn_loss, rpn_targets
from mrcnn_jax.parallel import per_image, replicated
from mrcnn_jax.runs.state import TrainState
from mrcnn_jax.structures import Batch, Instances, Params
from mrcnn_jax.training import stages
from mrcnn_jax.training.optimizer import apply_gradients, moving_average

Losses = dict[str, Float[Array, ""]]


def stage_losses(
    model: MaskRCNN,
    batch: Batch,
    key: PRNGKeyArray,
    losses: Collection[Loss],
    live: Collection[str],
    mesh: Mesh | None = None,
) -> tuple[Losses, Instances, dict[str, Array]]:
    """The losses of a stage on one batch, the proposals of each image, and counts of what was left
    out of the losses.

    Args:
        model: bound to its variables.
        key: randomness of this step; every image folds in its own index, so that the order of a
            batch does not matter.
        losses: which heads' losses; the forward pass goes no further than they need.
        live: top-level modules ("resnet", "res5", "rpn") that normalise by batch statistics.
        mesh: the devices that the rows of `batch` are spread over.
    """
    config = model.config
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(batch.indices)
    rpn_keys, box_keys = jax.vmap(lambda k: tuple(jax.random.split(k)))(keys)
    features = model.features(batch.images, batch.image_sizes, batch.valid, live="resnet" in live)
    output = model.propose(features, batch.image_sizes, batch.valid, live="rpn" in live)
    values: Losses = {}
    counts: dict[str, Array] = (
        {}
        if batch.lost is None
        else {"objects_lost": jnp.sum(jnp.where(batch.valid, batch.lost, 0))}
    )

    if "rpn" in losses:
        height, width = batch.images.shape[1:3]
        anchors = jnp.asarray(
            np.concatenate(pyramid_anchors(config.rpn, (height, width), config.strides))
        )
        label = jax.vmap(
            lambda k, size, gt, ignore: rpn_targets(k, anchors, size, gt, ignore, config.rpn)
        )
        targets = per_image(label, mesh)(
            rpn_keys, batch.image_sizes, batch.ground_truth, batch.ignore
        )
        values |= rpn_loss(output, targets, batch.valid, config.rpn)

    proposals = per_image(lambda o, b: select_proposals(o, b, config, train=True), mesh)(
        output, batch
    )
    draw = jax.vmap(lambda k, p, gt, ignore: box_samples(k, p, gt, ignore, config.box_head))
    samples = per_image(draw, mesh)(box_keys, proposals, batch.ground_truth, batch.ignore)
    if "box" in losses:
        predicted = model.boxes(features, samples.boxes, samples.valid, live="res5" in live)
        values |= box_loss(predicted, samples, batch.valid, config.box_head)

    if "mask" in losses:
        if config.mask_head.train_on == "detections":
            found = jax.lax.stop_gradient(model.detections(features, proposals, batch))
        else:
            found = Instances(boxes=samples.boxes, valid=samples.valid & (samples.labels > 0))
        choose = jax.vmap(lambda f, gt: mask_samples(f, gt, config.mask_head, config.mask_size))
        chosen = per_image(choose, mesh)(found, batch.ground_truth)
        counts["mask_boxes_left_out"] = jnp.sum(chosen.left_out)
        logits = model.masks(features, chosen.boxes, chosen.valid)
        values |= mask_loss(logits, chosen, batch.valid, config.mask_head)
        refine = config.mask_head.refine
        if refine.steps:
            coarse = true_class(logits, chosen.labels)
            point_keys = jax.vmap(lambda k: jax.random.fold_in(k, 2))(
                keys
            )  # `split` has made the first two of these
            choose_points = jax.vmap(lambda k, c, s, gt: point_samples(k, c, s, gt, refine))
            points = per_image(choose_points, mesh)(point_keys, coarse, chosen, batch.ground_truth)
            at_points = model.points(
                features, chosen.boxes, chosen.labels, chosen.valid, coarse, points.points
            )
            values |= point_loss(at_points, points, chosen, batch.valid, refine)
    return values, proposals, counts


TrainStep = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]


def make_train_step(
    model: MaskRCNN,
    stage: StageConfig,
    params: Params,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | None = None,
) -> TrainStep:
    """The step of a stage, not yet compiled: (state, batch) -> (state, losses and gradient norm).
    Of `params` only the names are read.

    Only the trainable subtree is differentiated, so that frozen parameters cost no backward pass;
    batch statistics of modules without a trainable parameter stay as they are. With a `mesh`, the
    rows of the batch are spread over it; parameters may be, and are put together before they are
    used.
    """
    labels = stages.labels(stage, params)
    live = stages.live_norm(stage, params)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        whole = (
            state.params
            if mesh is None
            else jax.lax.with_sharding_constraint(state.params, replicated(mesh))
        )
        trainable, frozen = stages.split(whole, labels)
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)

        def objective(
            trainable: Params,
        ) -> tuple[Float[Array, ""], tuple[Losses, dict[str, Array], Params]]:
            variables = {
                "params": stages.merge(trainable, frozen),
                "batch_stats": state.batch_stats,
            }
            forward = nn.apply(
                lambda m: stage_losses(m, batch, key, stage.losses, live, mesh),
                model,
                mutable=["batch_stats"],
            )
            (values, _, counts), updated = forward(variables)
            return sum(values.values(), jnp.float32(0)), (
                values,
                counts,
                updated.get("batch_stats", {}),
            )

        gradient = jax.value_and_grad(objective, has_aux=True)
        (total, (values, counts, statistics)), gradients = gradient(trainable)
        params, opt_state = apply_gradients(
            optimizer, state.opt_state, state.params, gradients, labels
        )
        ema = state.ema and moving_average(
            state.ema, stages.split(params, labels)[0], opt_state, stage.ema_decay
        )
        batch_stats = {
            name: statistics[name] if name in live else old
            for name, old in state.batch_stats.items()
        }
        metrics = {f"loss/{name}": value for name, value in values.items()}
        metrics |= counts | {"loss/total": total, "gradient_norm": optax.tree.norm(gradients)}
        return state.replace(
            params=params,
            batch_stats=batch_stats,
            opt_state=opt_state,
            step=state.step + 1,
            ema=ema,
        ), metrics

    return train_step


def make_validation_step(
    model: MaskRCNN, stage: StageConfig, mesh: Mesh | None = None
) -> Callable[[Variables, Batch, PRNGKeyArray], tuple[Losses, Instances]]:
    """(variables, batch, key) -> (losses, proposals) of a stage, with running statistics; `mesh` as
    in `make_train_step`."""

    def validation_step(
        variables: Variables, batch: Batch, key: PRNGKeyArray
    ) -> tuple[Losses, Instances]:
        if mesh is not None:
            variables = jax.lax.with_sharding_constraint(variables, replicated(mesh))
        values, proposals, _ = nn.apply(
            lambda m: stage_losses(m, batch, key, stage.losses, (), mesh), model
        )(variables)
        return {f"loss/{name}": value for name, value in values.items()} | {
            "loss/total": sum(values.values(), jnp.float32(0))
        }, proposals

    return validation_step
