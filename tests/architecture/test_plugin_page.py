import inspect
from pathlib import Path

import pytest

from fabric_core.registry.hookspecs import HOOKS, HookSpecs
from fabric_core.registry.ref import GROUPS, HOOK_GROUP

PAGE = (Path(__file__).parents[2] / "docs" / "plugins.md").read_text()


@pytest.mark.parametrize("hook", sorted(HOOKS))
def test_every_hook_is_in_the_authors_page_with_its_arguments(hook):
    arguments = [name for name in inspect.signature(getattr(HookSpecs, hook)).parameters if name != "self"]
    assert f"`{hook}({', '.join(arguments)})`" in PAGE


@pytest.mark.parametrize("group", [*GROUPS.values(), HOOK_GROUP])
def test_every_entry_point_group_is_in_the_authors_page(group):
    assert f"`{group}`" in PAGE
