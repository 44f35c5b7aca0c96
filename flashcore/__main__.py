"""`python -m flashcore`."""

import sys

from flashcore.cli.main import main

sys.exit(main())
