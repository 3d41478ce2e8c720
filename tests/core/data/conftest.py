import pytest

from fabric_core.rank_zero import rank_zero_only


@pytest.fixture(autouse=True)
def _no_seed_and_rank_zero(monkeypatch):
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "0")  # so that it is put back even if the test sets it
        monkeypatch.delenv(name)
    yield
    rank_zero_only.rank = None
