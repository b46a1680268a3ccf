"""python -m agent.cni."""

import sys

from agent.cni.main import main

sys.exit(main())
