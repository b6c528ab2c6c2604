"""`python -m posttrain.cli`, where the `posttrain` script is not on the path."""

import sys

from posttrain.cli import main

if __name__ == "__main__":
    sys.exit(main())
