"""`python -m mpjax.cli`."""

import sys

from mpjax.cli import main

sys.exit(main())
