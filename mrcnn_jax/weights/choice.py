"""What weights fix in the config of a run that starts from them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.files import with_fields
from mrcnn_jax.config.schema import Config
from mrcnn_jax.output import listed
from mrcnn_jax.weights.origin import Origin

_TRUNK = "trunk"
RESNET = (
    _TRUNK,
    "resnet.depth",
    "resnet.width",
    "resnet.stride_in_1x1",
    "resnet.norm_epsilon",
    "pixel_mean",
    "pixel_std",
)
"""Fields of `ModelConfig` that a ResNet's parameters have their shape or meaning by."""
CONVNEXT = (_TRUNK, "convnext.blocks", "convnext.channels", "pixel_mean", "pixel_std")
"""The same of those of a ConvNeXt."""
# If another is given, or a cascade needs it, these outputs start anew.
_CLASS_AGNOSTIC = {"box_head.class_agnostic": "box", "mask_head.class_agnostic": "mask"}
HEADS = (
    "backbone",
    "fpn_channels",
    "fpn_norm",
    *(f"rpn.{name}" for name in ("ratios", "channels", "convs", "batch_norm", "anchor_grid")),
    "rpn.box_weights",
    *(f"roi.{name}" for name in ("op", "aligned")),
    *(
        f"box_head.{name}"
        for name in ("convs", "conv_channels", "norm", "fcs", "hidden", "pool_size", "box_weights")
    ),
    *(f"mask_head.{name}" for name in ("channels", "convs", "norm", "deconv_kernel", "pool_size")),
    *_CLASS_AGNOSTIC,
)
"""The same of those of all other modules. Anchor scales and the sizes that belong to FPN levels are
not among them: they go with the size of the images. A cascade is not either: its further heads are
modules that weights may lack, as a depth head is."""
CASCADE = ("box_head.cascade_box_weights",)
"""The same of the further heads of a cascade."""
IMAGES = ("data.shrink",)
"""Fields of `Config` that a whole network is used to: how its images were made."""


@dataclass(frozen=True)
class Choice:
    """The fields that weights fix, and the classes that they know."""

    path: Path
    title: str
    fields: Mapping[str, Any]
    """Value by dotted name, "model.resnet.depth" for example."""
    presumed: Collection[str]
    """Fields whose value is only the published weights', and the user may know better."""
    classes: int
    """Their number; 0 if there are no outputs per class."""
    class_names: tuple[str, ...]
    """() if they are unknown."""

    def applied(self, config: Config, given: Collection[str]) -> Config:
        """Sets the fields of a config, and prints a line for each.

        Args:
            config: its init_from is `path`.
            given: dotted names of the fields that the user gave on the command line; they stay.

        Raises:
            ConfigError: names a field that contradicts the weights, and both values.
        """
        lines, values, same = [], {}, 0
        for name, value in self.fields.items():
            own = attrgetter(name)(config)
            differs = own != value
            if name == f"model.{_TRUNK}" and not differs:
                continue  # the lines of its sizes say so
            if differs and name in ("model.backbone", f"model.{_TRUNK}"):
                # The stage table names the modules of a backbone.
                raise ConfigError(f"{name}: {own}, but {self.path} needs a config with {value}")
            outputs = _CLASS_AGNOSTIC.get(name.removeprefix("model."))
            if differs and name in given and not (name in self.presumed or outputs):
                raise ConfigError(
                    f"{name}: {own}, but {self.path} ({self.title}) has {value}: leave out "
                    f"--{name.replace('_', '-')}, or take other weights"
                )
            needed = {
                "box": len(config.model.box_head.cascade) > 0 and "model.box_head.cascade",
                "mask": config.model.mask_head.loss == "softmax" and "model.mask_head.loss softmax",
            }.get(outputs or "", False)
            if differs and outputs and (name in given or needed):
                why = "as given" if name in given else f"for {needed}"
                lines.append(
                    f"  {name}: {own}, {why} (these weights have {value}: their {outputs} outputs "
                    "are left out)"
                )
            elif differs and name in given:
                lines.append(f"  {name}: {own}, as given (presumably {value} in these weights)")
            elif differs:
                lines.append(f"  {name}: {value} (the config has {own})")
                values[name] = value
            elif name in IMAGES or name.removeprefix("model.") in {*RESNET, *CONVNEXT}:
                lines.append(f"  {name}: {value}")
            else:
                same += 1
        print("\n".join((f"weights: {self.path}: {self.title}", *lines)))
        if same:
            print(f"  {same} more fields of the network are as in the config")
        return with_fields(config, values)

    def other_classes(self, class_names: Sequence[str]) -> str | None:
        """Why outputs per class cannot be those of the weights; None if they can, or are none.

        Args:
            class_names: of labels 1..K of the run.
        """
        if self.classes == 0:
            return None
        if self.classes != len(class_names):
            return f"{self.classes} classes there, {len(class_names)} here"
        pairs = enumerate(zip(self.class_names, class_names, strict=False), start=1)
        changed = [f"{label} is {a!r} there, {b!r} here" for label, (a, b) in pairs if a != b]
        if not changed:
            return None
        return f"other classes: {listed(changed)}"


def choose(path: Path, origin: Origin) -> Choice:
    """Says what weights fix.

    Args:
        path: a run's folder or a weights file.
        origin: what is known of it.
    """
    trunk = CONVNEXT if origin.model.trunk == "convnext" else RESNET
    heads = (*HEADS, *(CASCADE if origin.model.box_head.cascade else ()))
    names = (*trunk, *(heads if origin.has_heads else ()))
    fields = {f"model.{name}": attrgetter(name)(origin.model) for name in names}
    return Choice(
        path,
        origin.title,
        fields | ({"data.shrink": origin.shrink} if origin.has_heads else {}),
        origin.presumed,
        origin.model.num_classes if origin.has_heads else 0,
        origin.class_names,
    )


def fixed_by_runs() -> frozenset[str]:
    """Dotted names of the fields that a run as weights fixes, whatever is given."""
    names = (*RESNET, *CONVNEXT, *HEADS, *CASCADE)
    return frozenset(f"model.{name}" for name in names if name not in _CLASS_AGNOSTIC) | {*IMAGES}


def chosen_before(config: Config, saved: Config, given: Collection[str]) -> Config:
    """Gives a config the fields that weights fixed when its run began.

    Args:
        config: as the command states it.
        saved: of the run.
        given: as of `Choice.applied`; a field that differs from the run's is refused later.
    """
    names = {f"model.{name}" for name in (*RESNET, *CONVNEXT, *HEADS, *CASCADE)} | {
        *IMAGES,
        "init_without_classes",
    }
    try:
        return with_fields(config, {name: attrgetter(name)(saved) for name in names - set(given)})
    except ConfigError:
        return config  # the run is of another network, which is told where the two are compared
