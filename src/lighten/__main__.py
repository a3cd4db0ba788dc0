"""`python -m lighten` is the command line."""

from lighten.cli.main import main

if __name__ == "__main__":  # a process that is not forked imports it anew
    main()
