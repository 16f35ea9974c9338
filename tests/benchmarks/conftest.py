"""The benchmarks are no package: they run from their folder and import each other as siblings."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
