"""A store with a real collector, as the tests of the trainer have it."""

from tests.trainer.conftest import store

__all__ = ["store"]
