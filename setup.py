"""What pyproject.toml cannot say: the recipes of configs/ go into the package, where `--config
NAME` finds them."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["mrcnn_jax*"]), "mrcnn_jax.configs"],
    package_dir={"mrcnn_jax.configs": "configs"},
)
