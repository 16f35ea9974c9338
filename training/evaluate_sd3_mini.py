"""`evaluate_mini.py` under the name by which sd3-mini's model card calls it."""

from __future__ import annotations

import logging

from evaluate_mini import main
from mini_models import quiet_libraries

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    quiet_libraries()
    main()
