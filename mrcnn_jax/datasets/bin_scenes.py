"""Scenes of a bin with objects in it, by MuJoCo: they are dropped, come to rest, and are drawn.

Lengths are in metres, with z up and the bin's floor around the origin at z = 0. One camera draws
all scenes: its field of view never changes, but its place and the light do.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from jaxtyping import Float, Float32, Int32, UInt8

from mrcnn_jax.cli import Failure
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.datasets.shapes import texture
from mrcnn_jax.pixels.encode import encode_image

CLASSES = ("box", "cylinder", "capsule", "ellipsoid")
OBJECTS = (8, 20)
BIN = (0.4, 0.3)  # inner sides: those of a common container
RIM = (0.1, 0.14)  # height of its walls
WALL = 0.008  # thickness of its walls and floor
FIELD_OF_VIEW = 45.0  # vertical, in degrees
NEAR, FAR = 0.05, 10.0  # from the camera, along its axis: nothing else is drawn

STEP = 0.002  # seconds
EVERY = 60  # steps: objects are dropped one after the other
AT_MOST = 2500  # steps to come to rest after the last one
AT_REST = (0.005, 0.2)  # metres and radians in a second
ATTEMPTS = 20  # scenes tried until all objects lie in the bin, which nearly all do at once
SUPERSAMPLING = 2
# Groups of geoms: MuJoCo draws 0, 1 and 2.
SHOWN, HIDDEN = 0, 3


@dataclass(frozen=True)
class Rendering:
    """What the camera sees of a scene."""

    colour: UInt8[np.ndarray, "h w 3"]
    depth: Float32[np.ndarray, "h w"]
    """Metres along the camera's axis, not along the ray; 0 is unknown."""
    ids: Int32[np.ndarray, "h w"]
    """The object that is seen, from 1; 0 is none."""
    labels: tuple[int, ...]
    """Object -> its class, 1 for the first of CLASSES."""
    whole: tuple[int, ...]
    """Object -> the pixels that it would have with nothing in front of it."""


@dataclass(frozen=True)
class Scene:
    """Objects at rest, as MuJoCo's model and state: geom `first` is object 1, the next is 2, ..."""

    model: Any
    data: Any
    labels: tuple[int, ...]
    first: int


def load_mujoco() -> Any:
    """Returns the module, after it has shown that it can draw. Call before the rest of this file.

    Raises:
        ConfigError: it is not installed, or has nothing to draw with; says what to install.
    """
    if importlib.util.find_spec("mujoco") is None:
        raise ConfigError("generate bins: mujoco is not installed (pip install mujoco)")
    chosen = os.environ.setdefault("MUJOCO_GL", "osmesa")  # draws without a screen or a GPU
    try:
        import mujoco

        mujoco.Renderer(mujoco.MjModel.from_xml_string("<mujoco/>"), 8, 8).close()
    except Exception as error:  # of PyOpenGL, where a library is missing: any
        why = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"generate bins: mujoco cannot draw with MUJOCO_GL={chosen}; the default, osmesa, "
            f"needs OSMesa (Debian: apt-get install libosmesa6): {why:.200}"
        ) from None
    return mujoco


def draw_scene(stream: tuple[int, ...], size: tuple[int, int]) -> Rendering:
    """Drops objects into a bin and draws what lies in it.

    Args:
        stream: seeds the scene's random numbers: the same gives the same bytes.
        size: (height, width) of the pictures.

    Raises:
        Failure: in ATTEMPTS attempts, no scene had all objects in the bin.
    """
    for attempt in range(ATTEMPTS):
        rng = np.random.default_rng((*stream, attempt))
        scene = drop_objects(rng, size)
        if scene is not None:
            return look(scene, rng, size)
    raise Failure(f"no scene after {ATTEMPTS} attempts")


# -- physics ---------------------------------------------------------------------------------------


def drop_objects(rng: np.random.Generator, size: tuple[int, int]) -> Scene | None:
    """Drops objects one by one, and waits until they rest.

    Args:
        rng: chooses everything in the scene.
        size: (height, width) of the pictures that `look` is to draw.

    Returns:
        The scene; None if an object does not come to rest, or not in the bin.
    """
    import mujoco

    count = rng.integers(OBJECTS[0], OBJECTS[1] + 1)
    labels = tuple(rng.integers(1, len(CLASSES) + 1, count).tolist())
    xml, files = _described(rng, labels, size)
    model = mujoco.MjModel.from_xml_string(xml, files)
    data = mujoco.MjData(model)
    poses, speeds = data.qpos.reshape(-1, 7), data.qvel.reshape(-1, 6)
    waiting = poses.copy()
    for number in range(len(labels)):
        poses[number, :2] = rng.uniform(-0.5, 0.5, 2) * (np.array(BIN) - 0.16)
        poses[number, 2] = 0.32
        turn = rng.standard_normal(4)
        poses[number, 3:] = turn / np.linalg.norm(turn)
        speeds[number, 2] = -1
        for _ in range(EVERY):
            mujoco.mj_step(model, data)
            poses[number + 1 :], speeds[number + 1 :] = waiting[number + 1 :], 0
    # What held objects back above the walls, too, goes away.
    guards = model.geom_group == HIDDEN
    model.geom_contype[guards] = model.geom_conaffinity[guards] = 0
    for _ in range(AT_MOST):
        mujoco.mj_step(model, data)
        if all(abs(speeds).reshape(-1, 2, 3).max((0, 2)) < AT_REST):
            break
    else:
        return None
    if (abs(poses[:, :2]) > np.array(BIN) / 2).any() or (poses[:, 2] < 0).any():
        return None
    mujoco.mj_forward(model, data)
    return Scene(model, data, labels, model.geom("object1").id)


def _described(
    rng: np.random.Generator, labels: tuple[int, ...], size: tuple[int, int]
) -> tuple[str, dict[str, bytes]]:
    """A scene in MuJoCo's XML, with its objects waiting above; and the files that it names."""
    rim, height, width = rng.uniform(*RIM), *size
    files = {"table": _picture(rng, 128, 40, 0.25), "bin": _picture(rng, 32, 12, 0.6)}
    files |= {f"object{n}": _picture(rng, 64, 110, 1.0) for n in range(1, len(labels) + 1)}
    # "2d" repeats at a fixed length on the endless table; "cube" wraps a body whatever its size.
    assets = "".join(
        f'<texture name="{name}" type="{"2d" if name == "table" else "cube"}" file="{name}.png"/>'
        f'<material name="{name}" texture="{name}" texuniform="{str(name == "table").lower()}"'
        f' texrepeat="2 2" specular="{rng.uniform(0.05, 0.8):.3f}"'
        f' shininess="{rng.uniform(0.1, 0.9):.3f}"/>'
        for name in files
    )
    objects = "".join(
        f'<body pos="0 0 {1 + 0.3 * n}"><joint type="free" damping="0.0002"/>'
        f'<geom name="object{n}" type="{CLASSES[label - 1]}" size="{_text(_sizes(rng, label))}"'
        f' material="object{n}" density="{rng.uniform(400, 1200):.0f}"/></body>'
        for n, label in enumerate(labels, 1)
    )
    xml = f"""<mujoco>
  <option timestep="{STEP}" integrator="implicitfast" cone="elliptic" impratio="3">
    <flag multiccd="enable"/>
  </option>
  <statistic center="0 0 0" extent="1"/>
  <visual>
    <global offwidth="{SUPERSAMPLING * width}" offheight="{SUPERSAMPLING * height}"/>
    <quality shadowsize="2048" offsamples="0" numslices="64" numstacks="32"/>
    <map znear="{NEAR}" zfar="{FAR}"/>
    <headlight ambient="{_text([rng.uniform(0.25, 0.45)] * 3)}" specular="0 0 0"
      diffuse="{_text([rng.uniform(0, 0.2)] * 3)}"/>
  </visual>
  <default><geom condim="6" friction="0.6 0.003 0.001" solref="0.005 1"/></default>
  <asset>{assets}</asset>
  <worldbody>{_lights(rng)}{_camera(rng, rim, width / height)}{_bin(rim)}{objects}</worldbody>
</mujoco>"""
    return xml, {f"{name}.png": content for name, content in files.items()}


def _bin(rim: float) -> str:
    """Floor, walls and table; and hidden planes on the bin's inner sides, which nothing passes,
    however fast or high it is."""
    x, y, half = BIN[0] / 2, BIN[1] / 2, WALL / 2
    boxes = [((0.0, 0.0, -half), (x, y, half))]
    planes = [((0.0, 0.0, 0.0), (0, 0, 1))]
    for side in (-1, 1):
        middle, upright = (rim - WALL) / 2, (rim + WALL) / 2
        boxes.append(((side * (x + half), 0, middle), (half, y + WALL, upright)))
        boxes.append(((0, side * (y + half), middle), (x, half, upright)))
        planes.append(((side * x, 0, 0), (-side, 0, 0)))
        planes.append(((0, side * y, 0), (0, -side, 0)))
    return f'<geom type="plane" size="0 0 0.1" pos="0 0 {-WALL}" material="table"/>' + "".join(
        [
            f'<geom type="box" material="bin" pos="{_text(place)}" size="{_text(sizes)}"/>'
            for place, sizes in boxes
        ]
        + [
            f'<geom type="plane" group="{HIDDEN}" size="1 1 1" pos="{_text(place)}"'
            f' zaxis="{_text(axis)}"/>'
            for place, axis in planes
        ]
    )


def _sizes(rng: np.random.Generator, label: int) -> Float[np.ndarray, " n"]:
    """Half sides or half axes; or radius and half length, of a capsule without its ends."""
    if CLASSES[label - 1] in ("box", "ellipsoid"):
        return rng.uniform(0.016, 0.042, 3)
    return rng.uniform((0.013, 0.018), (0.03, 0.05))


def _picture(rng: np.random.Generator, side: int, contrast: float, colourful: float) -> bytes:
    """A PNG of two colours that differ by up to `contrast`; grey if `colourful` is 0."""
    first = rng.uniform(20, 240, 3)
    first = first.mean() + colourful * (first - first.mean())
    second = np.clip(first + rng.uniform(-contrast, contrast, 3), 0, 255)
    picture = texture(rng, side, side, first, second)
    picture += rng.uniform(0, 8) * rng.standard_normal(picture.shape, np.float32)
    return encode_image(np.clip(picture, 0, 255).astype(np.uint8), ".png")


def _lights(rng: np.random.Generator) -> str:
    """One to three lamps above, of which all cast shadows."""
    count = rng.integers(1, 4)
    lights = []
    for _ in range(count):
        place = np.append(rng.uniform(-0.9, 0.9, 2), rng.uniform(1.0, 1.8))
        aim = np.append(rng.uniform(-0.1, 0.1, 2), 0.0) - place
        colour = rng.uniform(0.6, 0.9) / count * rng.uniform(0.85, 1.0, 3)
        lights.append(
            f'<light pos="{_text(place)}" dir="{_text(aim)}" diffuse="{_text(colour)}"'
            f' specular="{_text(colour / 2)}" cutoff="45" exponent="2" castshadow="true"/>'
        )
    return "".join(lights)


def _camera(rng: np.random.Generator, rim: float, aspect: float) -> str:
    """A camera that looks down at the whole bin, at a slant of up to 30 degrees.

    Args:
        rng: chooses direction, roll and room around the bin.
        rim: height of the bin.
        aspect: width / height of the picture.
    """
    slant, around = np.radians([rng.uniform(0, 30), rng.uniform(0, 360)])
    back = np.array([np.sin(slant) * np.cos(around), np.sin(slant) * np.sin(around), np.cos(slant)])
    # The bin's long side lies along the picture's, or nearly so.
    turn = np.radians(rng.uniform(-20, 20) + 180 * rng.integers(2))
    right = np.array([np.cos(turn), np.sin(turn), 0])
    right -= (right @ back) * back
    right /= np.linalg.norm(right)
    up = np.cross(back, right)
    target = np.append(rng.uniform(-0.02, 0.02, 2), 0.03)
    # From a distance d, a corner at (x, y, z) of the camera's axes around the target is in the
    # picture if |x| <= (d - z) tan(half of the field of view), and so for y.
    tangent = np.tan(np.radians(FIELD_OF_VIEW / 2))
    corners = (np.array(list(np.ndindex(2, 2, 2))) - (0.5, 0.5, 0)) * (*BIN, rim)
    x, y, z = np.stack([right, up, back]) @ (corners - target).T
    least = (z + np.maximum(abs(x) / (aspect * tangent), abs(y) / tangent)).max()
    place = target + least * rng.uniform(1.08, 1.35) * back
    return (
        f'<camera name="camera" pos="{_text(place)}" xyaxes="{_text(right)} {_text(up)}"'
        f' fovy="{FIELD_OF_VIEW}"/>'
    )


def _text(numbers: Any) -> str:
    """Numbers as an attribute of the XML."""
    return " ".join(f"{number:.6g}" for number in numbers)


# -- pictures --------------------------------------------------------------------------------------


def look(scene: Scene, rng: np.random.Generator, size: tuple[int, int]) -> Rendering:
    """Draws a scene.

    Args:
        scene: of `drop_objects` for pictures of this size.
        rng: for what the camera adds: exposure, white balance and noise.
        size: (height, width).
    """
    import mujoco

    model, data, count = scene.model, scene.data, len(scene.labels)
    height, width = size
    with mujoco.Renderer(model, SUPERSAMPLING * height, SUPERSAMPLING * width) as renderer:
        renderer.update_scene(data, "camera")
        colour = cv2.resize(renderer.render(), (width, height), interpolation=cv2.INTER_AREA)
    gains = rng.uniform(0.85, 1.15) * rng.uniform(0.95, 1.05, 3)
    noise = rng.uniform(1, 4) * rng.standard_normal(colour.shape, np.float32)
    with mujoco.Renderer(model, height, width) as renderer:
        renderer.update_scene(data, "camera")
        renderer.enable_depth_rendering()
        depth = renderer.render()
        renderer.enable_segmentation_rendering()
        ids = _objects(renderer.render()[..., 0], scene.first, count)
        groups, whole = model.geom_group.copy(), []
        for number in range(count):
            model.geom_group[:] = HIDDEN
            model.geom_group[scene.first + number] = SHOWN
            renderer.update_scene(data, "camera")
            whole.append(int((renderer.render()[..., 0] >= 0).sum()))
        model.geom_group[:] = groups
    return Rendering(
        colour=np.clip(np.rint(colour * gains + noise), 0, 255).astype(np.uint8),
        depth=np.where(depth < 0.999 * FAR, depth, 0).astype(np.float32),
        ids=ids,
        labels=scene.labels,
        whole=tuple(whole),
    )


def _objects(geoms: Int32[np.ndarray, "h w"], first: int, count: int) -> Int32[np.ndarray, "h w"]:
    """The objects' numbers, from 1, where geom `first` is object 1 of `count`; 0 elsewhere."""
    numbers = geoms - first + 1
    return np.where((numbers >= 1) & (numbers <= count), numbers, 0).astype(np.int32)
