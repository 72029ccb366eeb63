"""Segmentation nets: to add one, write the function and name it here."""

from rollsight.inspect.nets import deeplab, fast, fcn, unet

NETS = {
    "fcn": fcn.fcn,
    "unet": unet.unet,
    "unet_lite": unet.unet_lite,
    "deeplabv3plus": deeplab.deeplabv3plus,
    "mobile": deeplab.mobile,
    "fast": fast.fast,
}
