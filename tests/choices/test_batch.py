"""The batch beside a search over all sizes, and its estimate beside compiled programs."""

from __future__ import annotations

from dataclasses import replace

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mrcnn_jax.choices.batch import (
    FIXED,
    OF_RESNET,
    ChosenBatch,
    choose_batch,
    fixed_bytes,
    image_bytes,
    rate_for,
)
from mrcnn_jax.choices.devices import Device, Devices
from mrcnn_jax.config.files import load_config_file
from mrcnn_jax.config.model import ModelConfig
from mrcnn_jax.config.schema import DataConfig, OptimizerConfig
from mrcnn_jax.config.tables import TORCHVISION
from mrcnn_jax.models.initialise import variable_shapes
from mrcnn_jax.training.memory import GIB

SGD = OptimizerConfig(name="sgd", batch_size=2)
ADAM = OptimizerConfig(name="adam", batch_size=8)
LARGE = DataConfig(canvases=((800, 1344), (1344, 800), (1024, 1024)))
SMALL = DataConfig(short_side=320, long_side=480, canvases=((320, 480), (480, 320)))


def batch(
    memory: float | None,
    images: int = 10_000,
    *,
    device: Device = "gpu",
    optimizer: OptimizerConfig = SGD,
    count: int = 1,
    data: DataConfig = LARGE,
    model: ModelConfig = TORCHVISION,
) -> ChosenBatch:
    """`memory`: GiB of a device."""
    devices = Devices(device, count, None if memory is None else int(memory * GIB))
    return choose_batch(optimizer, "r.py", devices, data, model, images)


@pytest.mark.parametrize(
    ("device", "size", "dtype", "gib"),
    [
        ("gpu", 2, "bfloat16", 1.72),  # docs/speed.md
        ("gpu", 16, "bfloat16", 10.2),
        ("gpu", 2, "float32", 2.98),  # gpu_compile.py --config configs/finetune.py --dtype float32
        ("gpu", 16, "float32", 19.56),
        ("cpu", 2, "float32", 4.9 + 0.9),  # and what the process has beside the program
    ],
)
def test_the_estimate_is_what_is_compiled(
    device: Device, size: int, dtype: str, gib: float
) -> None:
    model = replace(TORCHVISION, compute_dtype=dtype)  # type: ignore[arg-type]
    needs = FIXED[device] + size * image_bytes(device, LARGE, model)
    assert needs / GIB == pytest.approx(gib, rel=0.03)


def test_what_an_image_needs_follows_the_network() -> None:
    usual = image_bytes("gpu", LARGE, TORCHVISION)
    assert image_bytes("gpu", SMALL, TORCHVISION) / usual == pytest.approx(320 * 480 / 800 / 1344)
    deep = replace(TORCHVISION, resnet=replace(TORCHVISION.resnet, depth=101))
    # As finetune.py with ResNet-101 is compiled at batch 2, but for its weights.
    needs = FIXED["gpu"] + 2 * image_bytes("gpu", LARGE, deep)
    assert needs / GIB == pytest.approx(4.01 - 12 * 19e6 / GIB, rel=0.03)
    assert image_bytes("gpu", LARGE, load_config_file("shapes").model) == usual / 2
    # A float32 of each anchor (3 a cell of P2 to P6) and object.
    cells = sum(-(-800 // stride) * -(-1344 // stride) for stride in (4, 8, 16, 32, 64))
    crowded = image_bytes("gpu", replace(LARGE, max_objects=900), TORCHVISION)
    assert crowded - usual == pytest.approx(4 * 3 * cells * 800, rel=0.01)


@pytest.mark.parametrize("convs", [0, 2])
def test_the_further_heads_of_a_cascade_count(convs: int) -> None:
    """Their weights are those of the network, but for biases."""
    head = replace(
        TORCHVISION.box_head, class_agnostic=True, convs=convs, fcs=2 - convs // 2, conv_channels=32
    )
    plain = replace(TORCHVISION, box_head=head)
    cascade = replace(TORCHVISION, box_head=replace(head, cascade=(0.6, 0.7)))
    params = variable_shapes(cascade)["params"]
    count = sum(
        leaf.size for name in ("box_head2", "box_head3") for leaf in jax.tree.leaves(params[name])
    )
    more = fixed_bytes("gpu", cascade) - fixed_bytes("gpu", plain)
    assert more == pytest.approx(16 * count, rel=0.002)
    # By hand: two heads of 512 samples, of which a value and a gradient of each number is kept.
    numbers = 49 * (256 + convs * 32) + head.fcs * 1024
    more = image_bytes("cpu", LARGE, cascade) - image_bytes("cpu", LARGE, plain)
    assert more == pytest.approx(2 * 512 * 2 * 4 * numbers)


@settings(deadline=None)
@given(
    st.floats(0.1, 200),
    st.integers(1, 3000),
    st.sampled_from([1, 2, 3, 4, 8, 32]),
    st.sampled_from(["cpu", "gpu"]),
    st.sampled_from([SGD, ADAM]),
)
def test_it_is_the_largest_that_is_allowed(
    memory: float, images: int, count: int, device: Device, optimizer: OptimizerConfig
) -> None:
    """Of all multiples of the number of devices, by what each of the rules allows."""
    found = batch(memory, images, device=device, optimizer=optimizer, count=count).size
    assert found % count == 0
    usual = min(optimizer.batch_size, images)
    recipe = min(size for size in range(count, 99, count) if size >= usual)
    fixed, image = FIXED[device], image_bytes(device, LARGE, TORCHVISION)
    fits = {
        size
        for size in range(count, 99, count)
        if fixed + size // count * image <= 0.8 * int(memory * GIB)
    }
    grown = {recipe * 2**n for n in range(1, 5)} & fits
    grown = {size for size in grown if size <= 8 and -(-images // size) >= 50}
    if recipe not in fits:
        assert found in fits | {count}
        assert found < recipe or recipe == count
        # Twice as many would not fit.
        assert found == count or all(size not in fits for size in range(2 * found + count, 99))
    elif device == "cpu" or optimizer.name == "adam" or not grown:
        assert found == recipe
    else:
        assert found == max(grown)


@pytest.mark.parametrize(
    ("memory", "images", "size", "why"),
    [
        (80.0, 10_000, 8, "the most; needs about 10.2 GiB"),
        (9.0, 10_000, 4, "8 need about 10.2 GiB, over 80% of 9.0"),
        (80.0, 300, 4, "8 would leave 38 updates an epoch, under 50"),
        (80.0, 197, 4, "8 would leave 25 updates an epoch, under 50"),  # 4 leave 50
        (80.0, 196, 2, "4 would leave 49 updates an epoch, under 50"),
        (2.5, 10_000, 1, "2 need about 2.9 GiB, over 80% of 2.5"),
        (0.1, 10_000, 1, "2 need about 2.9 GiB, over 80% of 0.1"),
        (None, 10_000, 2, "as in r.py; the memory is not known"),
    ],
)
def test_on_a_gpu_memory_and_updates_decide(
    memory: float | None, images: int, size: int, why: str
) -> None:
    assert batch(memory, images) == ChosenBatch(size, why)


@pytest.mark.parametrize(("memory", "size"), [(3.0, 2), (2.5, 1), (0.5, 1), (900.0, 2)])
def test_on_a_cpu_it_is_two_images_or_one(memory: float, size: int) -> None:
    found = batch(memory, device="cpu", data=SMALL)
    assert found.size == size
    told = "as in r.py; more would be no faster on a CPU"
    assert found.why == (told if size == 2 else f"2 need about 2.0 GiB, over 80% of {memory}")


def test_adams_batch_does_not_grow() -> None:
    """Its rate does not follow the batch."""
    assert batch(80.0, optimizer=ADAM) == ChosenBatch(8, "as in r.py")


def test_several_devices_share_a_batch() -> None:
    assert batch(None, count=3).size == 3
    assert batch(80.0, count=3).size == 6
    assert batch(1.9, count=8).size == 8  # an image each, where two on one would not fit
    assert batch(80.0, 100, count=8).size == 8
    why = "as in r.py, made a multiple of the 8 devices; the memory is not known"
    assert batch(None, count=8) == ChosenBatch(8, why)


@pytest.mark.parametrize(
    ("size", "rate"),
    [
        *[(1, 0.0025), (2, 0.005), (6, 0.015), (8, 0.02)],  # in proportion, as configs/finetune.py
        *[(9, 0.02), (16, 0.02)],  # torchvision's and detectron2's, for 16 images
        *[(24, 0.03), (32, 0.04), (64, 0.08)],  # in proportion to that
    ],
)
def test_the_rate_follows_the_batch_and_never_leaves_what_is_usual(size: int, rate: float) -> None:
    found, why = rate_for(load_config_file("finetune").stages[0].optimizer, size)
    assert found == pytest.approx(rate)
    assert ("not tried here" in why) == (size > 8)


def test_a_larger_convnext_keeps_more_beside_the_images() -> None:
    """Four float32 numbers for each weight over those of a ConvNeXt-T, counted matrix by matrix."""
    tiny = replace(TORCHVISION, trunk="convnext")
    assert fixed_bytes("gpu", tiny) == fixed_bytes("gpu", TORCHVISION)
    blocks, channels = (3, 3, 27, 3), (192, 384, 768, 1536)
    large = replace(tiny, convnext=replace(tiny.convnext, blocks=blocks, channels=channels))
    weights = sum(n * (c * 4 * c + 4 * c * c) for n, c in zip(blocks, channels, strict=True)) - sum(
        n * 8 * c * c for n, c in zip((3, 3, 9, 3), (96, 192, 384, 768), strict=True)
    )
    more = fixed_bytes("gpu", large) - fixed_bytes("gpu", tiny)
    assert more == pytest.approx(4 * 4 * weights, rel=0.01)


def test_a_convnext_needs_what_its_blocks_keep() -> None:
    """Counted map by map at 800 x 1344, beside torchvision's network without its ResNet."""
    model = replace(TORCHVISION, trunk="convnext")
    usual, found = (image_bytes("gpu", LARGE, each) for each in (TORCHVISION, model))
    kept = 0
    for blocks, channels, stride in ((3, 96, 4), (3, 192, 8), (9, 384, 16), (3, 768, 32)):
        cells = 800 * 1344 / stride**2
        kept += blocks * (5 * channels + 8 * channels) * cells * 4
    assert found - usual == pytest.approx(kept - OF_RESNET * 800 * 1344, rel=0.03)
    half = replace(model, convnext=replace(model.convnext, channels=(48, 96, 192, 384)))
    assert usual - OF_RESNET * 800 * 1344 < image_bytes("gpu", LARGE, half) < found
