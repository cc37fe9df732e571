"""The S5 layer's core: project in, scan, project out."""

from models.kernels.s5.interface import s5_apply

__all__ = ["s5_apply"]
