"""`python -m attnlens.cli`."""

import sys

from attnlens.cli.app import main

sys.exit(main())
