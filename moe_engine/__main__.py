"""`python -m moe_engine` is the command line."""

from moe_engine.cli import main

main()
