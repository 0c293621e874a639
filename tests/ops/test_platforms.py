"""A program of ONNX has its own forms; all others keep the choice by platform."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from mrcnn_jax.ops.platforms import by_platform, for_onnx, is_for_onnx


def chosen(x: jax.Array) -> jax.Array:
    return by_platform(x, cpu=lambda x: x + 1, default=lambda x: x + 2, onnx=lambda x: x + 3)


def test_the_forms_for_onnx_are_traced_in_its_block_alone() -> None:
    x = jnp.float32(0)
    with for_onnx():
        inside = str(jax.make_jaxpr(chosen)(x))
        assert is_for_onnx()
        assert by_platform(x, cpu=jnp.sin, default=jnp.cos) == 1
    outside = str(jax.make_jaxpr(chosen)(x))
    assert "3.0" in inside
    assert "platform_index" not in inside
    assert "platform_index" in outside
    assert "3.0" not in outside
    assert not is_for_onnx()


def test_a_compiled_function_is_not_taken_for_the_other() -> None:
    """One function, called on one shape, before, in and after the block, and after an error."""
    compiled, x = jax.jit(chosen), jnp.float32(0)
    platform = 1 if jax.default_backend() == "cpu" else 2
    assert compiled(x) == platform
    with for_onnx():
        assert compiled(x) == 3
    assert compiled(x) == platform
    with pytest.raises(KeyError), for_onnx():
        raise KeyError
    assert compiled(x) == platform


def test_the_choice_is_lowered_for_each_platform() -> None:
    exported = jax.export.export(jax.jit(chosen), platforms=("cpu", "cuda"))(jnp.float32(0))
    text = exported.mlir_module()
    assert "stablehlo.case" in text
    assert "3.0" not in text
