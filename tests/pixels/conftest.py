"""Fixtures of the data room: augmented scenes come from its annotation files."""

from data.conftest import mixed_content, mixed_data, mixed_file, write_json

__all__ = ["mixed_content", "mixed_data", "mixed_file", "write_json"]
