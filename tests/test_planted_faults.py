"""Faults are planted by `make faults`; here, that they still can be."""

import subprocess
import sys


def test_the_table_of_faults_fits_the_source() -> None:
    command = [sys.executable, "tools/plant_faults.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
