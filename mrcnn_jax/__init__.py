"""Mask R-CNN in JAX and Flax: staged training on COCO-format data."""

__version__ = "0.1.0"
