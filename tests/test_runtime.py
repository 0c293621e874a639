"""Options of the compiler."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import jax
import pytest

from mrcnn_jax import runtime
from mrcnn_jax.config.errors import ConfigError


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    runtime.compiler_options.cache_clear()
    yield
    runtime.compiler_options.cache_clear()


def test_a_gpu_is_asked_for_determinism_by_an_option_that_this_jaxlib_has() -> None:
    plain = runtime.compiler_options("gpu")
    assert plain == {"xla_gpu_enable_command_buffer": runtime.COMMAND_BUFFERS}
    options = runtime.compiler_options("gpu", deterministic=True)
    assert options == plain | {"xla_gpu_deterministic_ops": True}
    # Compilers of every device share one list of options, and refuse what is not on it.
    assert jax.jit(lambda x: x + 1, compiler_options=options)(1) == 2
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        jax.jit(lambda x: x + 1, compiler_options={"xla_gpu_deterministic_operations": True})(1)


def test_a_jaxlib_without_the_option_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_known", lambda options: False)
    with pytest.raises(
        ConfigError,
        match=r"^deterministic: jaxlib .* has no option xla_gpu_deterministic_ops$",
    ):
        runtime.compiler_options("gpu", deterministic=True)


def test_on_a_cpu_determinism_is_there_and_one_line_says_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain = runtime.compile_options(donate_argnums=0)
    assert capsys.readouterr().out == ""
    for _ in range(3):
        assert runtime.compile_options(deterministic=True, donate_argnums=0) == plain
    assert (
        capsys.readouterr().out
        == "deterministic: no option needed, CPU runs are bit-equal anyway\n"
    )


@pytest.mark.parametrize(
    ("version", "backend", "slow"),
    [
        ("0.10.1", "gpu", False),
        ("0.10.2", "gpu", True),
        ("0.11.0", "gpu", True),
        ("0.11.0+local", "gpu", True),
        ("0.11.1", "gpu", False),
        ("0.12.0rc1", "gpu", False),
        ("0.11.0", "cpu", False),
    ],
)
def test_slow_versions_are_warned_of_on_a_gpu(
    version: str, backend: str, slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime.jaxlib, "__version__", version)
    monkeypatch.setattr(runtime.jax, "default_backend", lambda: backend)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        runtime.warn_of_slow_versions()
    messages = [str(one.message) for one in caught]
    assert len(messages) == slow
    assert all(message.startswith(f"jaxlib {version} is slow") for message in messages)
