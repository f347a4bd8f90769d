"""`python -m agl`: the program `agl`."""

import sys

from agl.cli import main

if __name__ == "__main__":
    sys.exit(main())
