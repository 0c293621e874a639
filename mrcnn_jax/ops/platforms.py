"""The choice of an operation's form: by the platform a program runs on, or for an ONNX program."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax

# A context that jax's caches of traced functions know of: what was traced inside it is not taken
# for what is traced outside.
_for_onnx = jax.make_user_context(False)


def for_onnx() -> AbstractContextManager[Any]:
    """What is traced in this block has no choice by platform in it, and the forms for ONNX."""
    return _for_onnx(True)


def is_for_onnx() -> bool:
    """Whether the program that is being traced will be one of ONNX."""
    return bool(_for_onnx.value)


def by_platform(
    *arguments: Any,
    cpu: Callable[..., Any],
    default: Callable[..., Any],
    onnx: Callable[..., Any] | None = None,
) -> Any:
    """Applies the form of a function for the platform that the program will run on.

    Args:
        arguments: of the function, arrays or trees of them.
        cpu: its form for CPUs.
        default: its form for other platforms.
        onnx: its form for ONNX, which has no place for such a choice; None: `default`.
    """
    if is_for_onnx():
        return (onnx or default)(*arguments)
    return jax.lax.platform_dependent(*arguments, cpu=cpu, default=default)
