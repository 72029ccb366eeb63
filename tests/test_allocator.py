"""Memory that a training frees stays with its process."""

import resource
import subprocess
import sys

import pytest

FAULTS = """
import resource
import torch
from rollsight.inspect.allocator import keep_freed_memory

kept = {kept} and keep_freed_memory()
for step in range(30):
    if step == 20:  # by then it has what it needs
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(8 << 20)  # 32 MB, freed at once
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(kept: bool) -> tuple[str, int]:
    """What a process of its own says: whether memory is kept, and the page faults of ten large tensors."""
    done = subprocess.run(
        [sys.executable, "-c", FAULTS.format(kept=kept)], capture_output=True, text=True, check=True
    )
    told, count = done.stdout.split()
    return told, int(count)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_a_tensor_that_is_made_again_costs_no_page_faults():
    told, few = faults(kept=True)
    if told == "False":
        pytest.skip("the C library has no mallopt")
    pages = 10 * (32 << 20) // resource.getpagesize()
    assert few < pages / 20
    assert faults(kept=False)[1] > 5 * few
