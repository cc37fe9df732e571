"""The scan and convolution cores: one interface each, implementations by platform behind it."""

from models.kernels.linear_scan import linear_scan
from models.kernels.long_conv import Spectrum, long_conv, spectrum
from models.kernels.s5 import s5_apply

__all__ = ["Spectrum", "linear_scan", "long_conv", "s5_apply", "spectrum"]
