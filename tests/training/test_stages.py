"""The stage table: labels against a hand-written tree, and every way in which a table can be
wrong."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.schema import OptimizerConfig, ParamGroup, StageConfig
from mrcnn_jax.training import stages

PARAMS = {
    "resnet": {
        "conv1": {"kernel": jnp.ones((2, 3))},
        "layer1": {"kernel": jnp.ones(4), "bias": jnp.ones(2)},
    },
    "fpn": {"lateral2": {"kernel": jnp.ones(5)}},
    "rpn": {"conv": {"kernel": jnp.ones((7, 1))}},
}


def stage(train: tuple[str, ...], frozen: tuple[str, ...] = (), **kwargs: object) -> StageConfig:
    groups = tuple(ParamGroup(pattern, 0.1**i) for i, pattern in enumerate(train))
    return StageConfig(name="rpn", losses=("rpn",), train=groups, frozen=frozen, **kwargs)  # type: ignore[arg-type]


TABLE = stage(("(fpn|rpn)/.*", "resnet/layer1/.*"), (r"resnet/conv1/.*",))


def test_labels_are_those_of_the_one_matching_pattern() -> None:
    assert stages.labels(TABLE, PARAMS) == {
        "resnet": {"conv1": {"kernel": "frozen"}, "layer1": {"kernel": "group1", "bias": "group1"}},
        "fpn": {"lateral2": {"kernel": "group0"}},
        "rpn": {"conv": {"kernel": "group0"}},
    }


def test_a_pattern_that_matches_the_start_of_a_path_does_not_match_it() -> None:
    params = {"rpn": {"scale": jnp.ones(1), "scale_two": jnp.ones(1)}}
    assert stages.labels(stage(("rpn/scale",), ("rpn/scale_two",)), params) == {
        "rpn": {"scale": "group0", "scale_two": "frozen"}
    }


def test_labels_need_no_arrays() -> None:
    shapes = jax.eval_shape(lambda: PARAMS)
    assert stages.labels(TABLE, shapes) == stages.labels(TABLE, PARAMS)
    assert stages.summary(TABLE, shapes, warmup=0) == stages.summary(TABLE, PARAMS, warmup=0)


def test_live_norm_of_res5_and_masks_do_not_train_together() -> None:
    """Masks read its running statistics, which the boxes of the box head alone move."""
    params = {"res5": {"kernel": jnp.ones(1)}, "mask_head": {"kernel": jnp.ones(1)}}
    both, alone = stage(("res5/.*", "mask_head/.*")), stage(("mask_head/.*",), ("res5/.*",))
    boxes = both
    both, alone = (dataclasses.replace(each, losses=("mask",)) for each in (both, alone))
    with pytest.raises(ConfigError, match=r"stages.rpn: trains masks and res5 with live batch n"):
        stages.refuse_partly_live(both, params, ["res5"])
    stages.refuse_partly_live(alone, params, ["res5"])
    stages.refuse_partly_live(boxes, params, ["res5"])
    stages.refuse_partly_live(both, params, [])


@pytest.mark.parametrize(
    ("table", "named"),
    [
        (
            stage(("(fpn|rpn)/.*", "rpm/.*"), ("resnet/.*",)),
            ("rpn", "'rpm/.*'", "fpn, resnet, rpn"),
        ),
        (stage(("(fpn|rpn)/.*",), ("resnet/.*", "c4/.*")), ("rpn", "'c4/.*'")),
        (stage(("(fpn|rpn)/.*",), ("resnet/layer1/.*",)), ("rpn", "resnet/conv1/kernel")),
        (
            stage(("(fpn|rpn)/.*", "fpn/lateral2/kernel"), ("resnet/.*",)),
            ("rpn", "'(fpn|rpn)/.*'", "'fpn/lateral2/kernel'", "fpn/lateral2/kernel"),
        ),
        (
            stage(("(fpn|rpn)/.*",), ("resnet/.*", "rpn/conv/.*")),
            ("rpn", "'(fpn|rpn)/.*'", "'rpn/conv/.*'", "rpn/conv/kernel"),
        ),
        # re.fullmatch: a prefix is no match.
        (stage(("(fpn|rpn)/.*",), ("resnet/conv1", "resnet/layer1/.*")), ("rpn", "'resnet/conv1'")),
    ],
)
def test_wrong_tables_are_one_line_that_names_stage_pattern_and_leaf(
    table: StageConfig, named: tuple[str, ...]
) -> None:
    summary = functools.partial(stages.summary, warmup=0)
    for function in (stages.labels, summary, stages.trained_modules):
        with pytest.raises(ConfigError) as caught:
            function(table, PARAMS)
        message = str(caught.value)
        assert "\n" not in message
        for name in (f"stages.{named[0]}", *named[1:]):
            assert name in message


def test_split_and_merge_hand_on_the_same_arrays() -> None:
    labels = stages.labels(TABLE, PARAMS)
    trainable, frozen = stages.split(PARAMS, labels)
    assert set(trainable) == {"resnet", "fpn", "rpn"}
    assert set(trainable["resnet"]) == {"layer1"}
    assert frozen == {"resnet": {"conv1": {"kernel": PARAMS["resnet"]["conv1"]["kernel"]}}}
    merged = stages.merge(trainable, frozen)
    assert str(jax.tree.structure(merged)) == str(jax.tree.structure(PARAMS))
    assert all(
        a is b for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(PARAMS), strict=True)
    )


def test_nothing_frozen() -> None:
    trainable, frozen = stages.split(PARAMS, stages.labels(stage((".*",)), PARAMS))
    assert frozen == {}
    assert str(jax.tree.structure(stages.merge(trainable, frozen))) == str(
        jax.tree.structure(PARAMS)
    )


def test_trained_modules_have_a_trained_parameter() -> None:
    assert stages.trained_modules(TABLE, PARAMS) == {"resnet", "fpn", "rpn"}
    assert stages.trained_modules(stage(("rpn/.*",), ("(resnet|fpn)/.*",)), PARAMS) == {"rpn"}


def test_summary_counts_leaves_and_parameters() -> None:
    table = stage(
        ("(fpn|rpn)/.*", "resnet/layer1/.*"),
        ("resnet/conv1/.*",),
        optimizer=OptimizerConfig(learning_rate=0.02),
        epochs=7,
    )
    text = stages.summary(table, PARAMS, warmup=30)
    lines = [line.split() for line in text.splitlines()]
    assert ["group0", "(fpn|rpn)/.*", "2", "12", "0.02"] in lines
    assert ["group1", "resnet/layer1/.*", "2", "6", "0.002"] in lines
    assert ["frozen", "resnet/conv1/.*", "1", "6", "-"] in lines
    assert ["trained", "18", "parameters,", "frozen", "6"] in lines
    assert "losses rpn" in text
    assert "warm-up 30 updates" in text
    assert "7 epochs" in text
