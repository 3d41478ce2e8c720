from pathlib import Path

from fabric_core import settings

PAGE = Path(__file__).parents[2] / "docs" / "environment-variables.md"


def rows():
    return {line.split("|")[1].strip(" `"): line for line in PAGE.read_text().splitlines() if line.startswith("| `")}


def test_every_variable_is_documented_as_declared():
    expected = {
        name: f"| `{name}` | {s.doc} | {f'`{s.default}`' if s.default is not None else ''} |"
        for name, s in settings.declared().items()
    }
    assert rows() == expected
