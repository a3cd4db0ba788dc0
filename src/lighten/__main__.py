"""`python -m lighten` is the command line."""

from lighten.cli.main import main

main()
