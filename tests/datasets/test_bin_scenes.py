"""Scenes against geometry: pinhole projection, rays, and the extent of each shape."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.datasets import bin_scenes, bins
from mrcnn_jax.datasets.bin_scenes import BIN, CLASSES, FIELD_OF_VIEW, Rendering, Scene

SIZE = (120, 160)


@pytest.fixture(scope="module")
def mujoco() -> Any:
    try:  # not importorskip: the way to draw is chosen when mujoco is imported first
        return bin_scenes.load_mujoco()
    except ConfigError as error:
        pytest.skip(str(error))


# -- the description of a scene, without MuJoCo ----------------------------------------------------


def _attribute(element: ElementTree.Element, name: str) -> np.ndarray:
    return np.array([float(word) for word in element.attrib[name].split()])


@pytest.mark.parametrize("seed", range(20))
def test_the_camera_sees_the_whole_bin(seed: int) -> None:
    rng = np.random.default_rng(seed)
    height, width = ((480, 640), (200, 600), (640, 480))[seed % 3]
    camera = ElementTree.fromstring(bin_scenes._camera(rng, 0.12, width / height))
    axes = _attribute(camera, "xyaxes").reshape(2, 3)
    np.testing.assert_allclose(axes @ axes.T, np.eye(2), atol=1e-5)
    forward = -np.cross(*axes)
    assert -1 <= forward[2] < -np.cos(np.radians(31)), "from above"
    focal = height / 2 / np.tan(np.radians(FIELD_OF_VIEW / 2))  # in pixels
    room = []
    for corner in np.ndindex(2, 2, 2):
        place = (np.array(corner) - (0.5, 0.5, 0)) * (*BIN, 0.12)
        ray = place - _attribute(camera, "pos")
        x, y = focal * (axes @ ray) / (forward @ ray)
        room.append(min(width / 2 - abs(x), height / 2 - abs(y)) / min(height, width))
    assert 0.01 < min(room) < 0.25, "all of it is in the picture, and fills it"


@pytest.mark.parametrize("seed", range(5))
def test_a_description(seed: int) -> None:
    """It holds what was asked for, its files are images, and nothing overlaps before the fall."""
    labels = (1, 2, 3, 4) * 5
    text, files = bin_scenes._described(np.random.default_rng(seed), labels, SIZE)
    root = ElementTree.fromstring(text)
    assert {texture.attrib["file"] for texture in root.iter("texture")} == files.keys()
    assert all(content.startswith(b"\x89PNG") for content in files.values())
    bodies = root.findall("worldbody/body")
    shapes = [body.find("geom") for body in bodies]
    assert [shape.attrib["type"] for shape in shapes] == [CLASSES[label - 1] for label in labels]
    heights = [_attribute(body, "pos")[2] for body in bodies]
    radii = [np.linalg.norm(_attribute(shape, "size")) for shape in shapes]  # at least
    assert np.diff(heights).min() > 2 * max(radii)
    assert 1 <= len(root.findall("worldbody/light")) <= 3


def test_ids_of_geoms_become_numbers_of_objects() -> None:
    geoms = np.array([[-1, 0, 6, 7], [8, 9, 10, 99]], np.int32)
    assert bin_scenes._objects(geoms, 7, 3).tolist() == [[0, 0, 0, 1], [2, 3, 0, 0]]


# -- physics ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scene(mujoco: Any) -> Scene:
    found = bin_scenes.drop_objects(np.random.default_rng(3), SIZE)
    assert found is not None
    return found


def _extents(scene: Scene) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Each object's least and greatest x, y and z, by its shape's support function."""
    for number, label in enumerate(scene.labels):
        geom = scene.first + number
        sizes, turn = scene.model.geom_size[geom], scene.data.geom_xmat[geom].reshape(3, 3)
        reach = []
        for axis in turn:  # a world axis in the shape's own frame
            if CLASSES[label - 1] == "box":
                reach.append(sum(abs(axis) * sizes))
            elif CLASSES[label - 1] == "ellipsoid":
                reach.append(np.sqrt(sum((axis * sizes) ** 2)))
            elif CLASSES[label - 1] == "capsule":
                reach.append(sizes[0] + abs(axis[2]) * sizes[1])
            else:
                reach.append(sizes[0] * np.hypot(*axis[:2]) + abs(axis[2]) * sizes[1])
        centre = scene.data.geom_xpos[geom]
        yield centre - reach, centre + reach


def test_objects_rest_in_the_bin(scene: Scene) -> None:
    """None hangs in the air, and none is sunk into the floor, a wall or another object."""
    assert bin_scenes.OBJECTS[0] <= len(scene.labels) <= bin_scenes.OBJECTS[1]
    touched = set(scene.data.contact.geom.ravel().tolist())
    rim = scene.model.geom_pos[:, 2].max()
    for number, (least, most) in enumerate(_extents(scene)):
        assert scene.first + number in touched
        assert least[2] > -0.001
        if most[2] < rim:
            assert (most[:2] < np.array(BIN) / 2 + 0.001).all()
            assert (least[:2] > -np.array(BIN) / 2 - 0.001).all()
    assert scene.data.contact.dist.min() > -0.0015
    assert min(least[2] for least, _ in _extents(scene)) < 0.0005
    assert abs(scene.data.qvel.reshape(-1, 6)[:, :3]).max() < 0.01


# -- pictures --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rendering(scene: Scene) -> Rendering:
    return bin_scenes.look(scene, np.random.default_rng(0), SIZE)


def _rays(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Directions of the pixels' centres in the world, with a unit of length along the axis."""
    turn = scene.data.cam_xmat[0].reshape(3, 3)
    height, width = SIZE
    scale = np.tan(np.radians(FIELD_OF_VIEW / 2)) / (height / 2)
    y, x = np.mgrid[:height, :width]
    local = np.stack([(x + 0.5 - width / 2) * scale, (height / 2 - y - 0.5) * scale], -1)
    local = np.concatenate([local, -np.ones((*SIZE, 1))], -1)
    return scene.data.cam_xpos[0], local @ turn.T


def _hits(mujoco: Any, scene: Scene, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Geom and depth at each pixel, from rays; -1 where nothing is hit."""
    place, rays = _rays(scene)
    geoms, depths = np.full(SIZE, -1), np.full(SIZE, -1.0)
    found = np.zeros((1, 1), np.int32)
    for pixel in np.ndindex(SIZE):
        # In units of the ray's length, which is 1 along the axis: this is the depth.
        depths[pixel] = mujoco.mj_ray(
            scene.model, scene.data, place, rays[pixel], groups, 1, -1, found
        )
        geoms[pixel] = found[0, 0]
    return geoms, depths


def test_pictures_show_what_rays_hit(mujoco: Any, scene: Scene, rendering: Rendering) -> None:
    geoms, depths = _hits(mujoco, scene, np.array([1, 0, 0, 0, 0, 0], np.uint8))
    ids = bin_scenes._objects(geoms, scene.first, len(scene.labels))
    assert (ids == rendering.ids).mean() > 0.99, "all but pixels on an edge"
    same = ids == rendering.ids
    error = abs(rendering.depth - depths)[same]
    assert np.quantile(error, 0.98) < 0.0005
    assert np.median(error) < 0.0001
    assert len(np.unique(rendering.ids)) > 8
    assert rendering.colour.std() > 20


def test_the_whole_of_an_object_is_its_picture_alone(
    mujoco: Any, scene: Scene, rendering: Rendering
) -> None:
    groups = scene.model.geom_group.copy()
    try:
        for number in (0, 3, 6):
            scene.model.geom_group[:] = 5
            scene.model.geom_group[scene.first + number] = 0
            geoms, _ = _hits(mujoco, scene, np.array([1, 0, 0, 0, 0, 0], np.uint8))
            whole = int((geoms >= 0).sum())
            assert rendering.whole[number] == pytest.approx(whole, rel=0.04)
    finally:
        scene.model.geom_group[:] = groups
    seen = [int((rendering.ids == number).sum()) for number in range(1, len(rendering.whole) + 1)]
    assert all(part <= whole for part, whole in zip(seen, rendering.whole, strict=True))
    assert any(part < whole for part, whole in zip(seen, rendering.whole, strict=True)), "occlusion"


def test_depth_is_along_the_axis(mujoco: Any) -> None:
    """A plane 1 m below is at 1 m in the corners too; the nearest point of a ball is at .7 m."""
    model = mujoco.MjModel.from_xml_string(
        f"""<mujoco><statistic extent="1"/>
        <visual><map znear="{bin_scenes.NEAR}" zfar="{bin_scenes.FAR}"/>
        <quality offsamples="0" numslices="64" numstacks="32"/></visual>
        <worldbody><camera name="camera" pos="0 0 1" fovy="{FIELD_OF_VIEW}"/>
        <geom type="plane" size="0 0 1"/><geom type="sphere" size=".1" pos="0.02 0.03 0.2"/>
        <geom type="sphere" size=".05" pos="0.02 0.03 0.08"/></worldbody></mujoco>"""
    )
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    scene = Scene(model, data, (4, 4), 1)
    rendering = bin_scenes.look(scene, np.random.default_rng(0), SIZE)
    for corner in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        assert rendering.depth[corner] == pytest.approx(1.0, abs=1e-4)
    assert rendering.depth.min() == pytest.approx(0.7, abs=3e-4)
    # A pixel sees a ball if its ray comes nearer to the centre than the radius.
    place, rays = _rays(scene)
    rays = rays / np.linalg.norm(rays, axis=-1, keepdims=True)
    for number, (radius, height) in enumerate(((0.1, 0.2), (0.05, 0.08))):
        centre = np.array([0.02, 0.03, height]) - place
        distance = np.sqrt(centre @ centre - (rays @ centre) ** 2)
        whole = int((distance < radius).sum())
        assert rendering.whole[number] == pytest.approx(whole, rel=0.01)
    assert (rendering.ids == 1).sum() == rendering.whole[0]
    assert (rendering.ids == 2).sum() == 0, "hidden by the first"


def test_what_is_too_far_has_no_depth(mujoco: Any) -> None:
    model = mujoco.MjModel.from_xml_string(
        f"""<mujoco><statistic extent="1"/>
        <visual><map znear="{bin_scenes.NEAR}" zfar="{bin_scenes.FAR}"/>
        <quality offsamples="0" numslices="64" numstacks="32"/></visual><worldbody>
        <camera name="camera" pos="0 0 1" fovy="{FIELD_OF_VIEW}"/>
        <geom type="sphere" size=".1"/></worldbody></mujoco>"""
    )
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    rendering = bin_scenes.look(Scene(model, data, (4,), 0), np.random.default_rng(0), SIZE)
    assert ((rendering.depth > 0) == (rendering.ids == 1)).all()
    assert rendering.depth[60, 80] == pytest.approx(0.9, abs=3e-4)


def test_same_bytes_from_any_number_of_processes(mujoco: Any, tmp_path: Path) -> None:
    bins.write_bins(tmp_path / "a", train=2, val=0, seed=7, size=(64, 96), processes=2)
    for name in ("images", "depth"):
        (tmp_path / "b" / name).mkdir(parents=True)
    image, objects = bins._write_scene(tmp_path / "b", 7, (64, 96), ("train", 1))
    content = json.loads((tmp_path / "a" / "annotations" / "instances_train.json").read_text())
    assert content["images"][1] == {"id": 2} | image
    second = [item for item in content["annotations"] if item["image_id"] == 2]
    ids = {"id": 0, "image_id": 0}
    assert [item | ids for item in second] == objects
    for name in ("images/train_00001.jpg", "depth/train_00001.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
