"""Memory that a training frees stays with its process."""

import os
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
    torch.ones(16 << 20)  # 64 MB, freed at once; glibc keeps up to 32 MB by itself
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(kept: bool) -> tuple[str, int]:
    """What a process of its own says: whether memory is kept, and the page faults of ten large tensors."""
    # Dask sets malloc's variables for its workers, and they stay in the environment of whoever started them.
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", FAULTS.format(kept=kept)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=plain)
    told, count = done.stdout.split()
    return told, int(count)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_a_tensor_that_is_made_again_costs_no_page_faults():
    pages = 10 * (64 << 20) // resource.getpagesize()
    if faults(kept=False)[1] < pages / 2:
        pytest.skip("the kernel gives huge pages here: large tensors cost few faults as it is")
    told, few = faults(kept=True)
    if told == "False":
        pytest.skip("the C library has no mallopt")
    assert few < pages / 20
