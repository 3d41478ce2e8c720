import pytest


@pytest.fixture(autouse=True)
def _isolated(isolated):
    """Every test of core leaves the process as it found it."""
