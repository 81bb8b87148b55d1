"""`python -m flarec`: the command line."""

from flarec.cli import main

if __name__ == "__main__":
    main()
