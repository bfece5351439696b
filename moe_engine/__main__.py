"""The command line as a program: `moe-engine`, `python -m moe_engine`."""

import sys


def main() -> None:
    """Ctrl-C ends quietly while the program is still being imported, too."""
    try:
        from moe_engine import cli
    except KeyboardInterrupt:
        sys.exit(130)
    cli.main()


if __name__ == "__main__":
    main()
