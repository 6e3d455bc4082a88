"""`python -m musicgenre` is the program `musicgenre`."""

import sys

from musicgenre.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
