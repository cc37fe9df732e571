"""Global convolutions, as long as the sequence."""

from models.kernels.long_conv.interface import Spectrum, long_conv, spectrum

__all__ = ["Spectrum", "long_conv", "spectrum"]
