"""A short run of bench/fuzz.py: damaged files of every kind are read or refused in one line."""

import json
import subprocess
import sys
from pathlib import Path


def test_damaged_files_of_every_kind_are_read_or_refused_in_one_line():
    command = [sys.executable, str(Path(__file__).parent.parent / "bench" / "fuzz.py"), "--no-result"]
    done = subprocess.run([*command, "--cases", "150"], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["cases"] == sum(sum(kind.values()) for kind in figures["by_target"].values()) == 150
    assert figures["bad"] == 0
    assert len(figures["by_target"]) == 10
