"""The compiled step of a stage: losses, gradients of what the stage trains, and the update."""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import Protocol

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from mrcnn_jax.config.schema import BOX_LOSSES, Loss, StageConfig
from mrcnn_jax.models.box_head import draw_box_samples
from mrcnn_jax.models.cascade import box_losses
from mrcnn_jax.models.depth_head import box_depth_loss, depth_loss
from mrcnn_jax.models.mask_head import mask_losses, mask_probabilities, mask_samples
from mrcnn_jax.models.mask_iou_head import mask_iou_loss
from mrcnn_jax.models.mask_rcnn import (
    MaskRCNN,
    Pyramid,
    Variables,
    modules_of,
    select_proposals,
)
from mrcnn_jax.models.rpn import rpn_losses
from mrcnn_jax.ops.sampling import drop_path_keys, image_keys
from mrcnn_jax.parallel import per_image, replicated
from mrcnn_jax.runs.state import TrainState
from mrcnn_jax.structures import Batch, Instances, Params
from mrcnn_jax.training import stages
from mrcnn_jax.training.optimizer import apply_gradients, moving_average

Losses = dict[str, Float[Array, ""]]


class CachedFeatures(flax.struct.PyTreeNode):
    """What frozen modules make of a batch, computed before."""

    features: Pyramid
    proposals: Instances | None  # None: the RPN is trained, or no loss needs it


def stage_losses(
    model: MaskRCNN,
    batch: Batch,
    key: PRNGKeyArray,
    losses: Collection[Loss],
    trained: Collection[str],
    cached: CachedFeatures | None = None,
    *,
    validation: bool = False,
) -> tuple[Losses, Instances | None, dict[str, Array]]:
    """The losses of a stage on one batch; the forward pass goes no further than they need.

    Args:
        model: bound to its variables.
        key: of this step's random draws.
        losses: the heads whose losses are wanted.
        trained: top-level modules that the stage trains: of these, "resnet", "res5" and "rpn"
            normalise by batch statistics and "convnext" leaves branches out, if so configured.
        cached: of this batch; what it holds is not computed again.
        validation: return the proposals of prediction, whose recall is measured, where those of
            training come of more candidates.

    Returns:
        The losses, the proposals in each image (None if no loss needs them), and counts of objects
        and boxes that no loss sees.
    """
    config, mesh, keys = model.config, model.mesh, image_keys(key, batch.indices)
    needed = set().union(*(modules_of(loss, config) for loss in losses))
    if cached is None:
        drop = "convnext" in trained and config.convnext.drop_path > 0
        features = model.features(
            batch,
            live="resnet" in trained,
            keys=drop_path_keys(key, batch.indices) if drop else None,
        )
    else:
        features = {
            name: leaf.astype(config.compute_dtype) for name, leaf in cached.features.items()
        }
    values: Losses = {}
    counts: dict[str, Array] = {}
    if batch.lost is not None:
        counts["objects_lost"] = jnp.sum(jnp.where(batch.valid, batch.lost, 0))
    depth_kind = config.depth_head.kind if "depth" in losses else "none"
    if depth_kind == "dense":
        assert batch.depth is not None  # open_run refuses data without depth
        log_depth = model.log_depth(features, batch)
        values |= depth_loss(log_depth, batch.depth, batch.valid, config.depth_head)
    if "rpn" not in needed:
        return values, None, counts
    if cached is not None and cached.proposals is not None:
        assert "rpn" not in losses
        proposals = cached.proposals
    else:
        output = model.rpn_output(features, batch, live="rpn" in trained)
        proposals = select_proposals(output, batch, config, train=True, mesh=mesh)
    samples = draw_box_samples(keys.box, proposals, batch, config.box_head, mesh)

    if "rpn" in losses:
        values |= rpn_losses(keys.rpn, output, batch, config.rpn, config.strides, mesh)
    if not set(BOX_LOSSES).isdisjoint(losses):
        values |= box_losses(
            samples,
            batch,
            config.box_head,
            losses,
            predict=functools.partial(model.box_output, features, live="res5" in trained),
            mesh=mesh,
        )
    found, mask_trained = samples.foreground, not {"mask", "mask_iou"}.isdisjoint(losses)
    if config.mask_head.train_on == "detections" and (mask_trained or depth_kind == "roi"):
        found = jax.lax.stop_gradient(model.detections(features, proposals, batch))
    if mask_trained:
        mask_values, left_out = _mask_losses(model, features, found, batch, keys.points, losses)
        values |= mask_values
        counts["mask_boxes_left_out"] = jnp.sum(left_out)
    if depth_kind == "roi":
        predict = functools.partial(model.box_log_depth, features)
        values |= box_depth_loss(found, batch, config, predict=predict, mesh=mesh)
    if (
        validation
        and "rpn" in losses
        and config.rpn.train_pre_nms not in (None, config.rpn.pre_nms)
    ):
        proposals = select_proposals(output, batch, config, train=False, mesh=mesh)
    return values, proposals, counts


def _mask_losses(
    model: MaskRCNN,
    features: Pyramid,
    found: Instances,
    batch: Batch,
    keys: PRNGKeyArray,
    losses: Collection[Loss],
) -> tuple[Losses, Array]:
    """The losses of masks and of their IoUs on boxes chosen from `found`, and how many are left
    out."""
    config, head, mesh = model.config, model.config.mask_head, model.mesh
    choose = per_image(lambda f, gt: mask_samples(f, gt, head, config.mask_size), mesh)
    chosen = choose(found, batch.ground_truth)
    pooled = model.mask_features(features, chosen.boxes, chosen.valid)
    logits = model.mask_logits(pooled, chosen.valid, chosen.labels)
    values: Losses = {}
    if "mask" in losses:
        refine = functools.partial(model.point_logits, features)
        values |= mask_losses(keys, logits, chosen, batch, head, refine=refine, mesh=mesh)
    if "mask_iou" in losses:
        masks = mask_probabilities(logits, chosen.labels, head)
        # Its gradient reaches the mask head and the features, as in the published code.
        ious = model.mask_ious(pooled, masks, chosen.labels, chosen.valid)
        values |= mask_iou_loss(ious, masks, chosen, batch, config.mask_iou_head, mesh=mesh)
    return values, chosen.left_out


class TrainStep(Protocol):
    """(state, batch, cached features of it) -> (state, losses, counts and gradient norm)."""

    def __call__(
        self, state: TrainState, batch: Batch, cached: CachedFeatures | None = None
    ) -> tuple[TrainState, dict[str, Array]]: ...


class ValidationStep(Protocol):
    """(variables, batch, key, cached features of the batch) -> (losses, proposals)."""

    def __call__(
        self,
        variables: Variables,
        batch: Batch,
        key: PRNGKeyArray,
        cached: CachedFeatures | None = None,
    ) -> tuple[Losses, Instances | None]: ...


def make_train_step(
    model: MaskRCNN,
    stage: StageConfig,
    params: Params,
    optimizer: optax.GradientTransformation,
) -> TrainStep:
    """The step of a stage, not yet compiled.

    Only the trainable subtree is differentiated, so frozen parameters cost no backward pass; batch
    statistics of modules without a trainable parameter stay as they are.

    Args:
        model: with the mesh that the rows of the batch are spread over; parameters may be spread
            too, and are gathered before use.
        params: parameters of the model; only their names are read.
        optimizer: of the full parameter tree, see `make_optimizer`.
    """
    labels = stages.labels(stage, params)
    trained = stages.trained_modules(stage, params)

    def train_step(
        state: TrainState, batch: Batch, cached: CachedFeatures | None = None
    ) -> tuple[TrainState, dict[str, Array]]:
        whole = state.params
        if model.mesh is not None:
            whole = jax.lax.with_sharding_constraint(whole, replicated(model.mesh))
        trainable, frozen = stages.split(whole, labels)
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)

        def objective(
            trainable: Params,
        ) -> tuple[Float[Array, ""], tuple[Losses, dict[str, Array], Params]]:
            params = stages.merge(trainable, frozen)
            forward = nn.apply(
                lambda m: stage_losses(m, batch, key, stage.losses, trained, cached),
                model,
                mutable=["batch_stats"],
            )
            (values, _, counts), updated = forward(
                {"params": params, "batch_stats": state.batch_stats}
            )
            total = sum(values.values(), jnp.float32(0))
            return total, (values, counts, updated.get("batch_stats", {}))

        gradient = jax.value_and_grad(objective, has_aux=True)
        (total, (values, counts, statistics)), gradients = gradient(trainable)
        params, opt_state = apply_gradients(
            optimizer, state.opt_state, state.params, gradients, labels
        )
        taken = state.step + 1 - state.skipped
        ema = state.ema and moving_average(
            state.ema, stages.split(params, labels)[0], opt_state, stage.ema_decay, taken
        )
        batch_stats = {
            name: statistics[name] if name in trained else old
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


def make_validation_step(model: MaskRCNN, stage: StageConfig) -> ValidationStep:
    """The losses of a stage without an update, not yet compiled.

    It normalises by running statistics; `model` as in `make_train_step`.
    """

    def validation_step(
        variables: Variables, batch: Batch, key: PRNGKeyArray, cached: CachedFeatures | None = None
    ) -> tuple[Losses, Instances | None]:
        if model.mesh is not None:
            variables = jax.lax.with_sharding_constraint(variables, replicated(model.mesh))
        forward = nn.apply(
            lambda m: stage_losses(m, batch, key, stage.losses, (), cached, validation=True), model
        )
        values, proposals, _ = forward(variables)
        metrics = {f"loss/{name}": value for name, value in values.items()}
        return metrics | {"loss/total": sum(values.values(), jnp.float32(0))}, proposals

    return validation_step
