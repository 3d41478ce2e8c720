"""The settings of numerics that a spawned process takes over."""

import pytest
import torch

from fabric_core.launchers.state import GlobalState

NEW = pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="needs torch 2.9")


def test_settings_are_put_back():
    before = GlobalState.capture()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_default_dtype(torch.float64)
    torch.set_float32_matmul_precision("medium")
    changed = GlobalState.capture()
    assert (changed.warn_only, changed.default_dtype, changed.matmul_precision) == (True, torch.float64, "medium")
    before.restore()
    after = GlobalState.capture()
    assert (after.warn_only, after.default_dtype, after.matmul_precision) == (False, torch.float32, "highest")


@NEW
@pytest.mark.parametrize("value", ["tf32", "ieee"])
def test_the_newer_way_to_set_precisions_is_followed(value):
    before = GlobalState.capture()
    torch.backends.cuda.matmul.fp32_precision = value
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    changed = GlobalState.capture()
    before.restore()
    assert GlobalState.capture().fp32_precisions == before.fp32_precisions
    changed.restore()
    assert GlobalState.capture().fp32_precisions == changed.fp32_precisions
    before.restore()


@NEW
def test_a_general_precision_does_not_hide_special_ones():
    before = GlobalState.capture()
    torch.backends.fp32_precision = "tf32"
    torch.backends.mkldnn.matmul.fp32_precision = "ieee"
    changed = GlobalState.capture().fp32_precisions
    state = GlobalState.capture()
    before.restore()
    assert torch.get_float32_matmul_precision() == before.matmul_precision
    state.restore()
    assert GlobalState.capture().fp32_precisions == changed
    before.restore()
