"""`python -m dist_train`, which is what `accelerate launch -m dist_train` starts."""

import sys

from dist_train.cli import main

if __name__ == "__main__":
    sys.exit(main())
