"""`python -m messenger`: the command line (`cli.py`) under another name."""

import sys

from messenger.cli import main

if __name__ == "__main__":
    sys.exit(main())
