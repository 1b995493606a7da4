"""Fixtures of other folders that tests of exact internal behaviour need."""

from tests.models.conftest import path

__all__ = ["path"]
