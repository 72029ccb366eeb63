"""What the system refuses while tensors are written, in one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rollsight.inspect.roll_places import disk_errors
from safetensors import SafetensorError


@contextmanager
def tensor_errors(path: Path) -> Iterator[None]:
    """As `disk_errors`, also of safetensors, whose error of a full disk is no OSError."""
    with disk_errors(path):
        try:
            yield
        except SafetensorError as error:
            raise OSError(str(error)) from error
