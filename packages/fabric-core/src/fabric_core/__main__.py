"""``python -m fabric_core`` and the console script ``fabric``."""

from __future__ import annotations


def main() -> None:
    """Run the command line of this process and exit."""
    from fabric_core.cli.main import cli

    cli(prog_name="fabric")


if __name__ == "__main__":
    main()
