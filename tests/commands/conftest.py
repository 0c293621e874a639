"""Fixtures of the rooms that the commands are made of."""

from data.conftest import mixed_content, mixed_file, write_json
from figures.conftest import titles

__all__ = ["mixed_content", "mixed_file", "titles", "write_json"]
