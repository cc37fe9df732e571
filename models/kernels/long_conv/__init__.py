"""Global convolutions, as long as the sequence."""

from models.kernels.long_conv.interface import long_conv

__all__ = ["long_conv"]
