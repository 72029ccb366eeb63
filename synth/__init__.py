"""Rare defects in, labelled data out: the simulated coil and, later, the generator."""
