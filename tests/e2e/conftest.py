"""Environments that several end-to-end tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from e2e.wheel_environment import Environment, build_wheels, make_environment, surroundings, without_backends


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheel of each package of this workspace."""
    return build_wheels(tmp_path_factory.mktemp("wheels"), "fabric-core", "fabric-bnb", "fabric-deepspeed")


@pytest.fixture(scope="session")
def backends(tmp_path_factory: pytest.TempPathFactory, wheels: dict[str, Path]) -> Environment:
    """Core and both backends, as wheels."""
    return make_environment(tmp_path_factory.mktemp("backends"), wheels.values(), surroundings())


@pytest.fixture(scope="session")
def core_alone(tmp_path_factory: pytest.TempPathFactory, wheels: dict[str, Path]) -> Environment:
    """Core as a wheel, and no backend."""
    root = tmp_path_factory.mktemp("core_alone")
    return make_environment(root, [wheels["fabric-core"]], without_backends(root / "dependencies"))
