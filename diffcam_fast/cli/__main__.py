"""`python -m diffcam_fast.cli`, the same as `diffcam`."""

import sys

from diffcam_fast.cli import main

sys.exit(main())
