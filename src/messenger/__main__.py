"""`python -m messenger`: the command line (`cli/`) under another name."""

import sys

from messenger.cli import main

if __name__ == "__main__":
    sys.exit(main())
