"""Checks what tests/weights assumes about torchvision's files on files made now."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
import state_dicts

from mrcnn_jax.models.initialise import variable_shapes
from mrcnn_jax.weights.families import MASKRCNN, family_of
from mrcnn_jax.weights.family import Family
from mrcnn_jax.weights.importer import import_weights
from mrcnn_jax.weights.mapping import assign, fill
from mrcnn_jax.weights.tensors import read_tensors

torch = pytest.importorskip("torch")
torchvision = pytest.importorskip("torchvision")
detection = pytest.importorskip("torchvision.models.detection")


def shapes_of(model: torch.nn.Module) -> state_dicts.Shapes:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("depth", state_dicts.BLOCKS)
def test_names_of_resnets(depth: int) -> None:
    model = getattr(torchvision.models, f"resnet{depth}")(weights=None, num_classes=10)
    assert shapes_of(model) == state_dicts.resnet(depth, width=64)


@pytest.mark.parametrize("name", ["maskrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn_v2"])
def test_names_of_mask_rcnns(name: str) -> None:
    model = getattr(detection, name)(weights=None, weights_backbone=None)
    assert shapes_of(model) == state_dicts.recorded(name, divisor=1)


def test_every_format_of_a_state_dict(tmp_path: Path) -> None:
    """Both serialisations, wrapped or not, safetensors, npz: the same tensors, which make a run."""
    from safetensors.torch import save_file

    model = detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    tensors = model.state_dict()
    torch.save(tensors, tmp_path / "zip.pth")
    torch.save(
        {"model": tensors, "epoch": 3},
        tmp_path / "stream.pth",
        _use_new_zipfile_serialization=False,
    )
    torch.save(torch.nn.DataParallel(model).state_dict(), tmp_path / "parallel.pt")
    save_file(tensors, tmp_path / "weights.safetensors")
    arrays = {key: tensor.numpy() for key, tensor in tensors.items()}
    np.savez(tmp_path / "weights.npz", **arrays)  # type: ignore[arg-type]
    for file in ("zip.pth", "stream.pth", "parallel.pt", "weights.safetensors", "weights.npz"):
        found = read_tensors(tmp_path / file).tensors
        assert found.keys() == arrays.keys(), file
        assert all(
            np.array_equal(found[key], arrays[key]) and found[key].dtype == arrays[key].dtype
            for key in arrays
        ), file
    import_weights(tmp_path / "stream.pth", tmp_path / "run")


class Log:
    """Stands for an object of mmengine in a checkpoint."""


def test_a_checkpoint_with_objects(tmp_path: Path) -> None:
    """mmdetection's training checkpoint, as torch writes it, with optimiser and log."""
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    meta = {"cfg": "style='caffe'", "dataset_meta": {"classes": ("a", "b")}, "log": Log()}
    content = {"meta": meta, "state_dict": layer.state_dict(), "optimizer": optimizer.state_dict()}
    for new in (True, False):
        torch.save(content, tmp_path / "epoch_1.pth", _use_new_zipfile_serialization=new)
        found = read_tensors(tmp_path / "epoch_1.pth")
        assert found.tensors.keys() == {"weight", "bias"}
        np.testing.assert_array_equal(found.tensors["weight"], layer.weight.detach().numpy())
        assert found.meta["dataset_meta"] == {"classes": ("a", "b")}


def test_narrow_types_of_torch(tmp_path: Path) -> None:
    values = torch.randn(4, 6)
    for dtype in (torch.float16, torch.bfloat16):
        torch.save(
            {"a": values.to(dtype), "b": values.to(dtype).t()[1:3]}, tmp_path / "weights.pth"
        )
        found = read_tensors(tmp_path / "weights.pth").tensors
        np.testing.assert_array_equal(
            found["a"].astype(np.float32), values.to(dtype).float().numpy()
        )
        np.testing.assert_array_equal(
            found["b"].astype(np.float32), values.to(dtype).t()[1:3].float().numpy()
        )


def mapped(family: Family, tensors: dict[str, np.ndarray]) -> dict:
    assert family.model is not None
    template = variable_shapes(family.model)
    return fill(template, assign(tensors, family.rules, family.left_out, "file"), tensors, "file")


def test_names_of_the_published_file() -> None:
    """torchvision reads those older names, and takes them for the same tensors as we do."""
    random = np.random.default_rng(0)
    older = {
        name: random.uniform(0.5, 2.0, shape).astype(np.float32)  # some are variances
        for name, shape in state_dicts.published(divisor=1).items()
    }
    model = detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    # As torchvision does before it reads the published file; its frozen batch norm has no counters.
    model.backbone.body = torchvision.models._utils.IntermediateLayerGetter(
        torchvision.models.resnet50(norm_layer=torchvision.ops.FrozenBatchNorm2d),
        {f"layer{i}": str(i - 1) for i in (1, 2, 3, 4)},
    )
    model.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in older.items()})
    newer = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    assert newer.keys() != older.keys()
    assert family_of(older, "file") == family_of(newer, "file") == MASKRCNN
    jax.tree.map(np.testing.assert_array_equal, mapped(MASKRCNN, older), mapped(MASKRCNN, newer))
