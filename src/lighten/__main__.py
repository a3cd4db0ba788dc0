"""`python -m lighten` is the command line."""

from lighten.cli import main

main()
