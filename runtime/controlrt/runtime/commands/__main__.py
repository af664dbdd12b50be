"""``python -m controlrt.runtime.commands`` is ``controlrt``."""

import sys

from controlrt.runtime.commands import main

sys.exit(main())
