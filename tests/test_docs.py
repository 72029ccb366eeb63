"""The examples in docstrings: every module imports, and what its examples say is so."""

import doctest
import importlib
import pkgutil

import pytest
import rollsight.inspect
import rollsight.jobs
import rollsight.synth

FLOORS = (rollsight.inspect, rollsight.synth, rollsight.jobs)
# `python -m rollsight.jobs` runs on import.
MODULES = [
    module.name
    for floor in FLOORS
    for module in pkgutil.walk_packages(floor.__path__, f"{floor.__name__}.")
    if not module.name.endswith("__main__")
]


def test_every_floor_has_modules():
    assert {name.split(".")[1] for name in MODULES} == {"inspect", "synth", "jobs"}
    assert "rollsight.inspect.nets.unet" in MODULES


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_the_docstrings_hold(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0
