"""Names of precisions that belong to a distribution of Fabric's own, whoever else claims them."""

import pytest

from fabric_core.registry.known import Known

MODES = ["nf4", "nf4-dq", "fp4", "fp4-dq", "int8", "int8-training"]


@pytest.mark.parametrize("name", [*MODES, *(f"bnb-{mode}" for mode in MODES)])
def test_quantized_precisions_are_reserved(name):
    assert Known().reserved_for("precision", name) == "fabric-bnb"
    assert Known().reserved_for("precision", name.replace("-", "_").upper()) == "fabric-bnb"
