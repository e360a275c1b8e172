"""Models know arrays: importing them loads no data set, no store, no encoder."""

import subprocess
import sys

FOREIGN = ("datasets", "features", "evaluation", "encoders", "training")


def test_importing_models_loads_nothing_that_reads_files():
    program = "import sys, avjax.models; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.split()
    assert "avjax.models.fusions.mult" in loaded
    assert not [name for name in loaded if name.startswith(tuple(f"avjax.{room}" for room in FOREIGN))]
