"""Segmentation nets: to add one, write the function and name it here."""

from rollsight.inspect.nets.unet import unet_lite

NETS = {"unet_lite": unet_lite}
