from __future__ import annotations

import pytest

from fabric_core.registry import Registry
from fabric_core.registry.known import Known
from plugin_site import PluginSite, site  # noqa: F401 - a fixture


@pytest.fixture
def registry(site: PluginSite, monkeypatch: pytest.MonkeyPatch) -> Registry:  # noqa: F811
    """Reads what is installed, with core's plugins and a table in which ``acme*`` belongs to ``fabric-acme``.

    The project's other packages are kept out, so that nothing depends on which of them are installed.
    """
    monkeypatch.setenv("FABRIC_PLUGINS_BLOCK", "fabric-bnb,fabric-deepspeed")
    known = Known(names={"strategy": {"acme": "fabric-acme", "acme_*": "fabric-acme"}}, minimum={"fabric-old": "2.0"})
    return Registry(known=known, hook_modules={})
