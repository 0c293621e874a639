"""Programs for a GPU: the joint step and prediction in bfloat16, lowered for CUDA here and read
operation by operation."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.extend.mlir import ir

from mrcnn_jax.config.model import ModelConfig
from mrcnn_jax.config.schema import ParamGroup
from mrcnn_jax.config.tables import joint
from mrcnn_jax.models.mask_rcnn import MaskRCNN, example_batch
from mrcnn_jax.runs.state import TrainState
from mrcnn_jax.structures import Batch, Instances
from mrcnn_jax.training.guard import guarded
from mrcnn_jax.training.optimizer import make_optimizer
from mrcnn_jax.training.step import make_train_step

CANVAS = (128, 128)
BATCH, OBJECTS = 2, 8

# What may touch a bfloat16: layers, pooling and RoIAlign's reads, and what moves values. No
# exponential, logarithm, quotient, no product of single numbers: geometry, softmax, losses,
# normalisation and updates are made of these.
BFLOAT16_OPERATIONS = {
    *("convolution", "dot_general", "add", "maximum", "compare", "select", "reduce"),
    *(
        "convert",
        "constant",
        "broadcast_in_dim",
        "reshape",
        "transpose",
        "reverse",
        "slice",
        "pad",
        "concatenate",
        "gather",
    ),
    *("call", "case", "return", "optimization_barrier"),
}


def model_config() -> ModelConfig:
    """tests/tiny.py's network with what configs/torchvision_coco.py has: batch norm frozen, the box
    head's samples for the mask head."""
    config = tiny.get_config().model
    return replace(
        config,
        compute_dtype="bfloat16",
        resnet=replace(config.resnet, norm="frozen"),
        rpn=replace(config.rpn, batch_norm=False),
        mask_head=replace(config.mask_head, train_on="box_samples"),
    )


def example() -> Batch:
    batch = jax.tree.map(lambda leaf: np.repeat(leaf, BATCH, axis=0), example_batch(CANVAS))
    exists = np.zeros((BATCH, OBJECTS), bool)
    boxes = np.zeros((BATCH, OBJECTS, 4), np.float32)
    truth = Instances(
        boxes=boxes,
        valid=exists,
        labels=np.zeros((BATCH, OBJECTS), np.int32),
        masks=np.zeros((BATCH, OBJECTS, 28, 28), np.uint8),
        has_mask=exists,
    )
    return batch.replace(
        ground_truth=truth, ignore=Instances(boxes=boxes[:, :1], valid=exists[:, :1])
    )


class Program:
    """The operations of a program lowered for CUDA."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        self.traced = jax.jit(function, **options).trace(*arguments)
        self.module, self.operations = self.lowered("cuda")

    def lowered(self, platform: str) -> tuple[Any, list[Any]]:
        """The program for a platform, and its operations."""
        lowered = self.traced.lower(lowering_platforms=(platform,))
        module, operations = lowered.compiler_ir("stablehlo"), []

        def visit(operation: Any) -> Any:
            operations.append(operation.operation)
            return ir.WalkResult.ADVANCE

        module.operation.walk(visit)
        return module, operations

    def named(self, *names: str) -> list[Any]:
        return [operation for operation in self.operations if short_name(operation) in names]

    @property
    def main(self) -> Any:
        return next(
            function for function in self.module.body.operations if function.name.value == "main"
        )


def short_name(operation: Any) -> str:
    return operation.name.split(".")[-1]


def element(value: Any) -> str:
    """Element type of a tensor: "f32", "bf16", ..."""
    return (
        str(value.type.element_type)
        if isinstance(value.type, ir.RankedTensorType)
        else str(value.type)
    )


def path(operation: Any) -> str:
    """Names of the transformations and modules that an operation comes from:
    jit(step)/jvp(...)/resnet/stem/..."""
    found = re.match(r'loc\("([^"]*)"', str(operation.location))
    return found[1] if found else ""


def origin(operation: Any) -> Any:
    """The operation itself, or what gives the result of every branch of a `case`."""
    if short_name(operation) != "case":
        return operation
    results = [
        list(region.blocks[0].operations)[-1].operands[0].owner for region in operation.regions
    ]
    assert len({str(result) for result in results}) == 1
    return origin(results[0])


def users(operation: Any) -> list[Any]:
    """Readers of an operation's result; of a branch's result, the readers of that of the `case`
    around it."""
    found = [use.owner.operation for use in operation.results[0].uses]
    return [
        reader
        for user in found
        for reader in (users(user.parent) if short_name(user.parent) == "case" else [user])
    ]


@pytest.fixture(scope="module")
def step() -> Program:
    model = MaskRCNN(model_config())
    heads = (ParamGroup(f"{head}/.*") for head in ("fpn", "rpn", "box_head", "mask_head"))
    frozen = ("resnet/(stem|layer1)/.*", "resnet/layer[234]/.*/(scale|bias)")
    (stage,) = joint((ParamGroup("resnet/layer[234]/.*/kernel"), *heads), frozen, epochs=1)
    shapes = jax.eval_shape(lambda batch: model.init(jax.random.key(0), batch), example())
    optimizer = make_optimizer(stage, shapes["params"], total_steps=10)

    def first_state(variables: Any) -> TrainState:
        key = jax.random.key_data(jax.random.key(0))
        return TrainState(
            variables["params"],
            variables["batch_stats"],
            optimizer.init(variables["params"]),
            jnp.int32(0),
            key,
        )

    state = jax.eval_shape(first_state, shapes)
    program = Program(
        guarded(make_train_step(model, stage, shapes["params"], optimizer), 0),
        state,
        example(),
        donate_argnums=0,
    )
    program.state_leaves = len(jax.tree.leaves(state))
    return program


@pytest.fixture(scope="module")
def prediction() -> Program:
    model = MaskRCNN(model_config())
    shapes = jax.eval_shape(lambda batch: model.init(jax.random.key(0), batch), example())
    return Program(model.apply, shapes, example())


@pytest.fixture(params=["step", "prediction"])
def program(request: pytest.FixtureRequest) -> Program:
    return request.getfixturevalue(request.param)


def test_nothing_leaves_the_device(program: Program) -> None:
    """No callback and no other custom call, no transfer; nor what `deterministic` has no form of
    (select-and-scatter)."""
    foreign = ("custom_call", "infeed", "outfeed", "send", "recv", "select_and_scatter")
    assert program.named(*foreign) == []
    assert len(program.named("convolution")) >= 20  # the search does find operations


def test_a_tpu_has_every_operation(program: Program) -> None:
    """It has no custom calls of other compilers, no complex numbers, no floats of 64 bits."""
    _, operations = program.lowered("tpu")
    names = {operation.name for operation in operations}
    assert {name.split(".")[0] for name in names} <= {"builtin", "func", "stablehlo", "chlo"}
    assert "stablehlo.convolution" in names
    assert not names & {"stablehlo.custom_call", "stablehlo.infeed", "stablehlo.outfeed"}
    kinds = {element(value) for operation in operations for value in operation.results}
    assert kinds <= {"f32", "bf16", "i1", "i32", "ui32", "ui8", "ui64"}  # the last one: of seeds


def test_the_only_loops_are_those_of_nms(step: Program, prediction: Program) -> None:
    """Within the blocks of boxes of all levels and images together; over the blocks of detections,
    and within them. No other kind of loop, and no branch.

    NMS, RoIAlign, convolutions and heads choose by platform: a `case` whose index is a constant,
    which compilers resolve.
    """
    places = ("rpn_proposals", "_greedy_in_block", "_greedy_row_by_row", "box_detections")

    def callers(program: Program) -> list[set[str]]:
        loops = [str(loop.location) for loop in program.named("while")]
        assert all("mrcnn_jax/ops/nms.py" in loop for loop in loops)
        return [{name for name in places if f'"{name}"(' in loop} for loop in loops]

    assert callers(step) == [{"rpn_proposals", "_greedy_in_block"}]
    blocks, within = {"box_detections"}, {"box_detections", "_greedy_in_block"}
    assert callers(prediction) == [{"rpn_proposals", "_greedy_in_block"}, within, blocks]
    branches = [*step.named("case", "if"), *prediction.named("case", "if")]
    assert all(
        re.search(
            r"mrcnn_jax/(ops/(roi|nms|rows)|models/(layers|convolution))\.py", str(branch.location)
        )
        for branch in branches
    )
    assert {short_name(origin(branch.operands[0].owner)) for branch in branches} == {"constant"}


def test_images_go_in_as_bytes_and_the_state_is_donated(step: Program) -> None:
    arguments = [(element(value), value.type.shape) for value in step.main.arguments]
    bytes_in = [shape for kind, shape in arguments if kind == "ui8"]
    assert bytes_in == [[BATCH, *CANVAS, 3], [BATCH, OBJECTS, 28, 28]]
    state = list(step.main.arg_attrs)[: step.state_leaves]
    assert len(state) > 100
    assert all("tf.aliasing_output" in attributes for attributes in state)


def test_sums_into_cells_are_float32(step: Program) -> None:
    """RoIAlign's backward pass, of boxes and of masks, whose features are bfloat16; and every other
    scatter of numbers."""
    scatters = [
        scatter
        for scatter in step.named("scatter")
        if element(scatter.results[0]) not in ("i1", "i32")
    ]
    assert {element(scatter.results[0]) for scatter in scatters} == {"f32"}
    alignments = [
        scatter for scatter in scatters if "mrcnn_jax/ops/roi.py" in str(scatter.location)
    ]
    assert len(alignments) == 2
    for scatter in alignments:
        (user,) = users(scatter)
        assert (short_name(user), element(user.results[0])) == ("convert", "bf16")


def test_long_sums_are_float32(program: Program) -> None:
    """In bfloat16 no more than the four cells of an upsampled one are summed, or compared in
    pooling."""
    for reduction in program.named("reduce"):
        if element(reduction.operands[0]) == "bf16":
            assert operation_size(reduction.operands[0]) <= 4 * operation_size(
                reduction.results[0]
            ), path(reduction)


def operation_size(value: Any) -> int:
    return int(np.prod(value.type.shape))


def test_products_of_matrices_are_bfloat16(program: Program) -> None:
    """Those of the last layers have float32 results, and no factor is rounded to TF32."""
    products = program.named("convolution", "dot_general")
    wide = [
        product
        for product in products
        if {element(value) for value in (*product.operands, *product.results)} != {"bf16"}
    ]
    assert len(products) > 25
    assert {short_name(product) for product in wide} == {"dot_general"}
    heads = set()
    for product in wide:
        assert element(product.results[0]) == "f32"
        layer = re.search(
            r"[)./](rpn|box_head|mask_head)/(?:\w+Head/)?(?:nhwpc,nc->nhwp/)?dot", path(product)
        )
        assert layer is not None, path(product)
        heads.add(layer[1])
        factors = {element(value) for value in product.operands}
        assert factors == {"bf16"} or (
            factors == {"f32"} and str(product.attributes["precision_config"]).count("HIGHEST") == 2
        )
    assert heads == {"rpn", "box_head", "mask_head"}


def test_bfloat16_is_for_layers_alone(program: Program) -> None:
    found = Counter(
        short_name(operation)
        for operation in program.operations
        if any(element(value) == "bf16" for value in (*operation.operands, *operation.results))
    )
    assert set(found) <= BFLOAT16_OPERATIONS
    assert found["convolution"] >= 20
