"""The train step of every stage on a tiny network: what moves, what may not, and what is not
computed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.errors import ModifyScopeVariableError
from flax.traverse_util import flatten_dict
from ops import laws

from mrcnn_jax.config.heads import (
    BoxHeadConfig,
    DepthHeadConfig,
    MaskHeadConfig,
    MaskIoUHeadConfig,
    PointRendConfig,
)
from mrcnn_jax.config.model import ConvNeXtConfig, ModelConfig, ResNetConfig, RoIConfig, RPNConfig
from mrcnn_jax.config.schema import Loss, OptimizerConfig, ParamGroup, StageConfig
from mrcnn_jax.config.tables import joint, staged
from mrcnn_jax.models.initialise import initialise
from mrcnn_jax.models.mask_rcnn import MaskRCNN, Variables, example_batch, modules_of
from mrcnn_jax.ops.sampling import image_keys
from mrcnn_jax.runs.state import TrainState
from mrcnn_jax.structures import Batch, Instances
from mrcnn_jax.training.optimizer import make_optimizer
from mrcnn_jax.training.stages import trained
from mrcnn_jax.training.step import make_train_step, make_validation_step, stage_losses

CANVAS = (64, 64)
CONVS = 2
CONFIG = ModelConfig(
    num_classes=2,
    fpn_channels=16,
    resnet=ResNetConfig(depth=10, width=8, norm="live"),
    rpn=RPNConfig(scales=(8, 16, 32, 64, 128), pre_nms=40, proposals=10, samples=32),
    roi=RoIConfig(canonical_size=56.0),
    box_head=BoxHeadConfig(hidden=32, pool_size=3, samples=8, detections=4),
    mask_head=MaskHeadConfig(channels=8, convs=CONVS, pool_size=4, samples=6),
)
MODEL = MaskRCNN(CONFIG)
C4 = replace(
    CONFIG,
    backbone="c4",
    box_head=replace(CONFIG.box_head, fcs=0, pool_size=4),
    mask_head=replace(CONFIG.mask_head, convs=0, deconv_kernel=2),
)
STEP = "mrcnn_jax.training.step"
QUICK_COMPILE = {"xla_backend_optimization_level": 0}  # each program runs a few times only
SGD = OptimizerConfig(name="sgd", learning_rate=0.01, momentum=0.9, weight_decay=0.1)
RPN, BOX, MASK = staged(pretrained=False, optimizers=(SGD, SGD, SGD))
BOX = replace(BOX, ema_decay=0.75)


def begun(model: MaskRCNN) -> Variables:
    return jax.tree.map(np.asarray, initialise(model, example_batch(CANVAS), seed=0))


@pytest.fixture(scope="module")
def variables() -> Variables:
    return begun(MODEL)


def paths(tree: Any, *modules: str) -> set[str]:
    """Of the leaves, all or those of modules."""
    flat = flatten_dict(tree, sep="/")
    return {path for path in flat if not modules or path.split("/")[0] in modules}


def batch(seed: int, valid: tuple[bool, bool] = (True, True)) -> Batch:
    """Two images with three objects each and a row that is not valid."""
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, 30, (2, 4, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(8, 18, (2, 4, 2))], axis=2).astype(
        np.float32
    )
    exists = np.tile([True, True, False, True], (2, 1))
    ground_truth = Instances(
        boxes=boxes,
        valid=exists,
        labels=rng.integers(1, 3, (2, 4)).astype(np.int32),
        masks=rng.integers(0, 256, (2, 4, 8, 8)).astype(np.uint8),
        has_mask=exists,
    )
    sizes = np.array([[50, 60], CANVAS], np.int32)
    return Batch(
        images=rng.integers(0, 256, (2, *CANVAS, 3)).astype(np.uint8),
        image_sizes=sizes,
        original_sizes=sizes,
        scales=np.ones((2, 2), np.float32),
        indices=np.array([2 * seed, 2 * seed + 1], np.int32),
        valid=np.array(valid),
        ground_truth=ground_truth,
        ignore=Instances(
            boxes=np.array([[[0, 0, 9, 9]]] * 2, np.float32), valid=np.array([[True], [False]])
        ),
        lost=np.array([2, 5], np.int32),
        depth=np.where(
            rng.random((2, 16, 16)) < 0.3, 0, np.linspace(0.5, 3, 16, dtype=np.float32)[:, None]
        ).astype(np.float32),
    )


def poisoned(batch: Batch, poison: float) -> Batch:
    """`batch` with `poison` in the rows of ground truth and ignore that do not exist."""

    def fill(rows: Instances) -> Instances:
        fields = {name: getattr(rows, name) for name in ("boxes", "labels", "masks", "has_mask")}
        return rows.replace(
            **laws.poisoned(
                {name: field for name, field in fields.items() if field is not None},
                rows.valid,
                poison,
            )
        )

    return batch.replace(ground_truth=fill(batch.ground_truth), ignore=fill(batch.ignore))


class Runner:
    """A stage's compiled step, and how often it was traced."""

    def __init__(self, stage: StageConfig, variables: Variables, model: MaskRCNN = MODEL) -> None:
        self.traces = 0
        optimizer = make_optimizer(stage, variables["params"], total_steps=100)
        step = make_train_step(model, stage, variables["params"], optimizer)
        start = TrainState(
            params=variables["params"],
            batch_stats=variables["batch_stats"],
            opt_state=optimizer.init(variables["params"]),
            step=jnp.int32(0),
            key=jax.random.key_data(jax.random.key(0)),
            ema=trained(stage, variables["params"]) if stage.ema_decay else {},
        )
        # NumPy arrays: `step` may donate what is made of them, and start again.
        self.start: Any = jax.tree.map(np.array, start)

        def counted(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
            self.traces += 1
            return step(state, batch)

        self.function = counted
        self.step = jax.jit(counted, donate_argnums=0, compiler_options=QUICK_COMPILE)

    def once(self, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        return jax.tree.map(np.asarray, self.step(self.start, batch))


@pytest.fixture(scope="module")
def box_runner(variables: Variables) -> Runner:
    return Runner(BOX, variables)


@pytest.fixture(scope="module")
def rpn_runner(variables: Variables) -> Runner:
    return Runner(RPN, variables)


DENSE, ROI = (
    replace(CONFIG, depth_head=DepthHeadConfig(kind, channels=8)) for kind in ("dense", "roi")
)
CASCADE = replace(
    CONFIG, box_head=replace(CONFIG.box_head, class_agnostic=True, cascade=(0.6, 0.7))
)


@pytest.mark.parametrize(
    ("loss", "config"),
    [(loss, config) for loss in ("rpn", "box", "mask") for config in (CONFIG, C4)]
    + [("mask", replace(CONFIG, trunk="convnext", convnext=ConvNeXtConfig((1, 1, 1, 1))))]
    + [("depth", DENSE), ("depth", ROI)]
    + [(loss, CASCADE) for loss in ("box", "box2", "box3", "mask")]
    + [
        ("mask_iou", replace(config, mask_iou_head=MaskIoUHeadConfig(True, channels=8, hidden=8)))
        for config in (CONFIG, C4)
    ],
)
def test_a_loss_reads_the_modules_that_it_is_said_to(loss: Loss, config: ModelConfig) -> None:
    """Flax makes the parameters of the modules that are called, and of no other."""
    model = MaskRCNN(config)
    init = nn.init(lambda m: stage_losses(m, batch(0), jax.random.key(0), (loss,), ())[0], model)
    assert set(jax.eval_shape(init, jax.random.key(0))["params"]) == modules_of(loss, config)


def test_losses_of_boxes_and_masks_end_at_the_boxes_that_they_are_given(
    variables: Variables,
) -> None:
    """Trained jointly, the RPN learns from its own loss alone, and the box head nothing from masks:
    proposals and detections are constants, also where targets follow the box continuously."""
    mask_head = replace(CONFIG.mask_head, soft_targets=True, match_iou=0.05, samples=12)
    model = MaskRCNN(replace(CONFIG, mask_head=mask_head))
    losses = "box", "mask"

    def objective(trained: Any) -> tuple[jax.Array, jax.Array]:
        params = variables["params"] | trained
        values, _, _ = nn.apply(
            lambda m: stage_losses(m, batch(0), jax.random.key(0), losses, ()), model
        )({"params": params, "batch_stats": variables["batch_stats"]})
        return values["box_class"] + values["box_box"], values["mask"]

    def gradients(trained: Any) -> list[Any]:
        (boxes, masks), pull = jax.vjp(objective, trained)
        return [pull(told)[0] for told in ((boxes, masks), (0 * boxes, masks))]

    ours = {name: variables["params"][name] for name in ("rpn", "box_head")}
    both, of_masks = jax.jit(gradients, compiler_options=QUICK_COMPILE)(ours)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves((both["rpn"], of_masks)))
    assert any(np.any(leaf) for leaf in jax.tree.leaves(both["box_head"]))


def test_each_draw_is_given_its_own_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else is computed here."""
    given: dict[str, jax.Array] = {}

    def draw(name: str, place: int, result: Any) -> None:
        def call(*args: Any, **_: Any) -> Any:
            given[name] = args[place]
            return result

        monkeypatch.setattr(f"{STEP}.{name}", call)

    draw("rpn_losses", 0, {})
    draw("draw_box_samples", 0, SimpleNamespace(foreground=None))
    draw("_mask_losses", 4, ({}, jnp.zeros(2, jnp.int32)))
    for name, result in (("select_proposals", None), ("box_losses", {})):
        monkeypatch.setattr(f"{STEP}.{name}", lambda *_, result=result, **__: result)
    model: Any = SimpleNamespace(
        config=replace(CONFIG, mask_head=replace(CONFIG.mask_head, train_on="box_samples")),
        mesh=None,
        features=lambda *_, **__: {},
        rpn_output=lambda *_, **__: None,
        box_output=lambda: None,
    )
    both, key = jax.tree.map(jnp.asarray, batch(4)), jax.random.key(3)
    stage_losses(model, both, key, ("rpn", "box", "mask"), ())
    keys = image_keys(key, both.indices)
    for name, own in zip(("rpn_losses", "draw_box_samples", "_mask_losses"), keys, strict=True):
        assert (given[name] == own).all(), name


def test_what_a_stage_does_not_train_is_normalised_by_running_statistics() -> None:
    """Flax refuses to move others where nothing says that they may."""
    model = MaskRCNN(C4)
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), example_batch(CANVAS)))

    def run(*modules: str) -> None:
        losses = nn.apply(
            lambda m: stage_losses(m, batch(0), jax.random.key(0), ("rpn", "box"), modules)[0],
            model,
        )
        jax.eval_shape(losses, variables)

    run("box_head", "mask_head")
    for module in ("resnet", "rpn", "res5"):
        with pytest.raises(ModifyScopeVariableError):
            run(module)


def test_training_takes_its_own_number_of_proposals(variables: Variables) -> None:
    model = MaskRCNN(replace(CONFIG, rpn=replace(CONFIG.rpn, train_proposals=30)))
    given = nn.apply(lambda m: stage_losses(m, batch(0), jax.random.key(0), ("box",), ())[1], model)
    assert jax.eval_shape(given, variables).boxes.shape == (2, 30, 4)


def moved(before: Any, after: Any) -> set[str]:
    """Paths of the leaves whose bits differ."""
    old, new = (flatten_dict(tree, sep="/") for tree in (before, after))
    assert set(old) == set(new)
    return {
        path
        for path, leaf in old.items()
        if np.asarray(leaf).tobytes() != np.asarray(new[path]).tobytes()
    }


def test_twenty_steps_of_the_box_stage_move_the_box_head_alone(box_runner: Runner) -> None:
    """With momentum and weight decay on, every other parameter and every batch statistic keeps its
    bits; one compilation does it."""
    state = box_runner.start
    before = jax.tree.map(np.array, state)
    losses = []
    assert before.ema.keys() == {"box_head"}
    average = jax.tree.map(np.float64, before.ema)
    for step in range(20):
        state, metrics = box_runner.step(state, batch(step % 3))
        decay = min(0.75, (step + 1) / (step + 10))
        average = jax.tree.map(
            lambda old, new, d=decay: d * old + (1 - d) * np.float64(new),
            average,
            {"box_head": state.params["box_head"]},
        )
        losses.append({name: float(value) for name, value in metrics.items()})
    assert box_runner.traces == 1
    assert int(state.step) == 20
    assert moved(before.params, state.params) == paths(before.params, "box_head")
    assert moved(before.batch_stats, state.batch_stats) == set()
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7),
        state.ema,
        average,
    )
    # Skipped steps made no update: had there been 20 of them, this would be the first.
    kept = jax.tree.map(np.array, state)
    after, _ = box_runner.step(kept.replace(skipped=np.int32(20)), batch(0))
    jax.tree.map(
        lambda ours, old, new: np.testing.assert_allclose(ours, 0.1 * old + 0.9 * new, atol=1e-6),
        after.ema,
        kept.ema,
        {"box_head": after.params["box_head"]},
    )
    state = kept
    assert set(losses[0]) == {
        "loss/box_class",
        "loss/box_box",
        "loss/total",
        "gradient_norm",
        "objects_lost",
    }
    for row in losses:
        assert row["loss/total"] == pytest.approx(
            row["loss/box_class"] + row["loss/box_box"], rel=1e-6
        )
        assert 0 < row["gradient_norm"] < np.inf
    assert losses[18]["loss/total"] < losses[0]["loss/total"]  # the same batch, seven times later


def test_each_step_draws_its_own_samples(rpn_runner: Runner) -> None:
    """From the same parameters and images: the key follows the step's number, and nothing else."""

    def loss(step: int) -> float:
        start = rpn_runner.start.replace(step=np.int32(step))
        return float(rpn_runner.step(start, batch(0))[1]["loss/rpn_objectness"])

    drawn = [loss(step) for step in (0, 1, 2)]
    assert len(set(drawn)) == 3
    assert [loss(step) for step in (0, 1, 2)] == drawn


def test_the_rpn_stage_moves_its_parameters_and_their_batch_statistics(rpn_runner: Runner) -> None:
    start = rpn_runner.start
    state, metrics = rpn_runner.once(batch(0))
    trained = paths(start.params, "resnet", "fpn", "rpn")
    assert moved(start.params, state.params) == trained
    before, after = (flatten_dict(tree, sep="/") for tree in (start.params, state.params))
    # The update undone: SGD by the gradient and a tenth of the parameter.
    gradients = [
        (before[path] - after[path]) / float(SGD.learning_rate) - 0.1 * before[path]
        for path in trained
    ]
    norm = np.sqrt(sum(np.sum(np.float64(leaf) ** 2) for leaf in gradients))
    assert metrics["gradient_norm"] == pytest.approx(norm, rel=1e-3)
    statistics = paths(start.batch_stats)
    assert {path.split("/")[0] for path in statistics} == {"resnet", "rpn"}
    assert moved(start.batch_stats, state.batch_stats) == statistics
    assert set(metrics) == {
        "loss/rpn_objectness",
        "loss/rpn_box",
        "loss/total",
        "gradient_norm",
        "objects_lost",
    }
    assert metrics["objects_lost"] == 7


def test_c4_trains_res5_with_the_box_head_alone() -> None:
    """Its batch statistics too, over the boxes that exist; under the mask head it is frozen."""
    model = MaskRCNN(C4)
    variables = begun(model)
    _, box, mask = staged(pretrained=False, backbone="c4", optimizers=(SGD, SGD, SGD))
    for stage, modules in ((box, {"res5", "box_head"}), (mask, {"mask_head"})):
        runner = Runner(stage, variables, model)
        state, metrics = runner.once(batch(0))
        assert all(np.isfinite(value) for value in metrics.values())
        assert {path.split("/")[0] for path in moved(runner.start.params, state.params)} == modules
        statistics = paths(runner.start.batch_stats, *modules)
        assert moved(runner.start.batch_stats, state.batch_stats) == statistics
        expected = runner.once(poisoned(batch(0), np.nan))
        jax.tree.map(np.testing.assert_array_equal, (state, metrics), expected)


def test_a_convnext_trains_what_its_stage_says_and_drops_branches_in_training_alone() -> None:
    """Branches are left out only where the ConvNeXt is trained."""
    trunk = ConvNeXtConfig((1, 1, 1, 1), (4, 6, 8, 10), layer_scale=1.0)
    config = replace(CONFIG, trunk="convnext", convnext=trunk)
    model = MaskRCNN(config)
    variables = begun(model)
    stage = StageConfig(
        name="rpn",
        losses=("rpn",),
        train=tuple(map(ParamGroup, (r"convnext/(stage[234]|norm\d)/.*", "fpn/.*", "rpn/.*"))),
        frozen=("convnext/(stem|stage1)/.*", "box_head/.*", "mask_head/.*"),
        optimizer=OptimizerConfig(name="adamw", weight_decay=0.1, decay_vectors=False),
    )
    state, metrics = (runner := Runner(stage, variables, model)).once(batch(0))
    assert all(np.isfinite(value) for value in metrics.values())
    ours = paths(trained(stage, variables["params"]))
    assert len(ours) > 40
    assert moved(runner.start.params, state.params) == ours

    # Without a gradient, weight decay alone moves: kernels, but no norm, bias or factor.
    optimizer = make_optimizer(stage, variables["params"], total_steps=9)
    nothing = jax.tree.map(jnp.zeros_like, variables["params"])
    with jax.numpy_dtype_promotion("standard"):
        state = optimizer.init(variables["params"])
        update = jax.jit(optimizer.update, compiler_options=QUICK_COMPILE)
        updates, _ = update(nothing, state, variables["params"])
    decayed = {path for path, leaf in flatten_dict(updates, sep="/").items() if leaf.any()}
    assert decayed == {path for path in ours if path.endswith("/kernel")}

    def loss(drop_path: float, modules: frozenset[str]) -> float:
        dropping = MaskRCNN(replace(config, convnext=replace(trunk, drop_path=drop_path)))
        losses = nn.apply(
            lambda m, b: stage_losses(m, b, jax.random.key(0), ("rpn",), modules)[0], dropping
        )
        found = jax.jit(losses, compiler_options=QUICK_COMPILE)(variables, batch(0))
        return float(found["rpn_objectness"])

    usual = loss(0.0, frozenset())
    assert loss(0.9, frozenset({"fpn"})) == usual
    assert loss(0.9, frozenset({"convnext", "fpn"})) != usual


def test_all_heads_together_without_inference_in_the_step(variables: Variables) -> None:
    """Joint training on the box head's mini-batch: every parameter moves, and NMS is the RPN's
    alone."""
    config = replace(CONFIG, mask_head=replace(CONFIG.mask_head, train_on="box_samples"))
    (stage,) = joint(train=(ParamGroup(".*"),), epochs=1, optimizer=SGD)
    runner = Runner(stage, variables, MaskRCNN(config))
    state, metrics = runner.once(batch(0))
    assert moved(runner.start.params, state.params) == paths(runner.start.params)
    losses = {name for name, value in metrics.items() if name.startswith("loss/") and value > 0}
    assert losses == {
        f"loss/{name}"
        for name in ("rpn_objectness", "rpn_box", "box_class", "box_box", "mask", "total")
    }

    def loops(runner: Runner) -> int:
        """Of NMS: on a GPU there are no others. That of detections has one in another."""
        lowered = runner.step.trace(runner.start, batch(0)).lower(lowering_platforms=("cuda",))
        return lowered.as_text().count("stablehlo.while")

    assert loops(runner) == 1
    assert loops(Runner(stage, variables)) == 3


@pytest.mark.parametrize("stage", ["rpn", "box"])
def test_rows_that_do_not_exist_may_hold_anything(
    stage: str, request: pytest.FixtureRequest
) -> None:
    runner = request.getfixturevalue(f"{stage}_runner")
    expected = runner.once(batch(0))
    for poison in laws.POISONS:
        jax.tree.map(
            np.testing.assert_array_equal, runner.once(poisoned(batch(0), poison)), expected
        )


@pytest.mark.parametrize("stage", ["rpn", "box"])
def test_an_image_that_fills_up_a_batch_may_hold_anything(
    stage: str, request: pytest.FixtureRequest
) -> None:
    """Neither losses nor updates nor batch statistics see it."""
    runner = request.getfixturevalue(f"{stage}_runner")
    partial, other = batch(0, valid=(True, False)), batch(1)
    mixed = jax.tree.map(
        lambda a, b: np.concatenate([a[:1], b[1:]]), partial, other.replace(valid=partial.valid)
    )
    expected = runner.once(partial)
    jax.tree.map(np.testing.assert_array_equal, runner.once(mixed), expected)
    assert moved(expected[1], runner.once(batch(0))[1]) == set(expected[1])  # a valid one does


def test_validation_proposes_as_prediction_does(variables: Variables) -> None:
    """Its recall is measured, whatever training takes more of."""
    rpn = replace(CONFIG.rpn, pre_nms=1, train_pre_nms=40)
    model = MaskRCNN(replace(CONFIG, rpn=rpn))
    validate = jax.jit(make_validation_step(model, RPN), compiler_options=QUICK_COMPILE)
    losses, found = validate(variables, batch(0), jax.random.key(0))
    propose = nn.apply(lambda m: m.proposals(m.features(batch(0)), batch(0)), model)
    expected = jax.jit(propose, compiler_options=QUICK_COMPILE)(variables)
    assert found is not None
    np.testing.assert_array_equal(found.valid, expected.valid)
    np.testing.assert_allclose(found.boxes, expected.boxes, atol=1e-3)
    more = jax.jit(make_validation_step(MODEL, RPN), compiler_options=QUICK_COMPILE)
    assert jnp.sum(more(variables, batch(0), jax.random.key(0))[1].valid) > jnp.sum(found.valid)
    assert losses["loss/total"] > 0


def test_losses_do_not_depend_on_an_added_invalid_image_or_on_the_order(
    variables: Variables,
) -> None:
    stage = replace(BOX, losses=("rpn", "box", "mask"))
    validate = jax.jit(make_validation_step(MODEL, stage), compiler_options=QUICK_COMPILE)
    key = jax.random.key(3)
    both = batch(0)
    backwards = jax.tree.map(lambda leaf: leaf[::-1], both)
    filled = jax.tree.map(
        lambda a, b: np.concatenate([a, b[:1]]), both, batch(1, valid=(False, False))
    )
    expected, proposals = validate(variables, both, key)
    assert set(expected) == {
        f"loss/{name}"
        for name in ("rpn_objectness", "rpn_box", "box_class", "box_box", "mask", "total")
    }
    assert all(float(value) > 0 for value in expected.values())
    assert proposals.boxes.shape == (2, 10, 4)
    for other in (backwards, filled):
        values, _ = validate(variables, other, key)
        for name, value in expected.items():
            assert float(values[name]) == pytest.approx(float(value), rel=1e-5), name


def test_a_normalised_and_refined_mask_branch_learns_a_batch(variables: Variables) -> None:
    """With group norm and points: both losses fall, all of the branch moves and nothing else, and
    what does not exist has no part in it."""
    refine = PointRendConfig(steps=2, train_points=16, channels=8, fcs=1)
    model = MaskRCNN(
        replace(CONFIG, mask_head=replace(CONFIG.mask_head, norm="group", refine=refine))
    )
    rng = np.random.default_rng(0)

    def layer(*kernel: int) -> dict[str, np.ndarray]:
        return {
            "kernel": rng.normal(scale=0.3, size=kernel).astype(np.float32),
            "bias": np.zeros(kernel[-1], np.float32),
        }

    branch = {
        **variables["params"]["mask_head"],
        "points": {"fc1": layer(17, 8), "logits": layer(9, 2)},
    }
    for name in ("conv1", "conv2"):
        branch[name] = {"kernel": branch[name]["kernel"]}
        branch[f"{name}_norm"] = {"scale": np.ones(8, np.float32), "bias": np.zeros(8, np.float32)}
    ours = {**variables, "params": variables["params"] | {"mask_head": branch}}
    halves = np.zeros((2, 4, 8, 8), np.uint8)
    halves[..., :4] = 255
    truth = batch(0)
    truth = truth.replace(ground_truth=truth.ground_truth.replace(masks=halves))

    runner = Runner(
        replace(MASK, optimizer=OptimizerConfig(name="adam", learning_rate=0.01)), ours, model
    )
    state, first = runner.once(truth)
    _, again = runner.once(poisoned(truth, np.nan))
    assert {name: value.tobytes() for name, value in first.items()} == {
        name: value.tobytes() for name, value in again.items()
    }
    assert moved(ours["params"], state.params) == paths({"mask_head": branch})
    metrics = first
    for _ in range(60):
        state, metrics = runner.step(state, truth)
    assert float(metrics["loss/mask"]) < 0.1 * float(first["loss/mask"])
    assert float(metrics["loss/mask_points"]) < 0.5 * float(first["loss/mask_points"])
    assert runner.traces == 1


def operations(function: Callable[..., Any], *args: Any) -> Counter[str]:
    """How often each operation stands in the compiled program, those of inner programs included.

    What is traced holds more: a form for each platform, and what nothing reads.
    """
    program = jax.jit(function, compiler_options=QUICK_COMPILE).lower(*args).compile()
    return Counter(re.findall(r" ([a-z][\w-]*)\(", program.as_text()))


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_the_mask_stage_holds_no_backward_pass_but_the_mask_heads(
    variables: Variables, clip_norm: float | None
) -> None:
    """Two products for each layer of the mask head (by its kernel, by its input), less the first
    one's by the input: that is all."""

    def step_operations(stage: StageConfig) -> Counter[str]:
        runner = Runner(replace(stage, optimizer=replace(SGD, clip_norm=clip_norm)), variables)
        return operations(runner.function, runner.start, batch(0))

    forward = operations(make_validation_step(MODEL, MASK), variables, batch(0), jax.random.key(0))
    step = step_operations(MASK)
    assert forward["convolution"] > 20
    assert step["convolution"] - forward["convolution"] == 2 * (CONVS + 1) - 1
    # The 1x1 convolution to the own class's mask, by its kernel; by its input it is no sum.
    assert step["dot"] - forward["dot"] == 1
    assert step["scatter"] == forward["scatter"]  # RoIAlign's backward would be one
    assert not any("callback" in name for name in step)
    # The count sees a backward pass where there is one: of FPN, RPN and ResNet.
    assert (
        step_operations(RPN)["convolution"]
        > 2
        * operations(make_validation_step(MODEL, RPN), variables, batch(0), jax.random.key(0))[
            "convolution"
        ]
    )
