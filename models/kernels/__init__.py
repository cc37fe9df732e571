"""The scan cores: one interface each, implementations by platform behind it."""

from models.kernels.linear_scan import linear_scan
from models.kernels.s5 import s5_apply

__all__ = ["linear_scan", "s5_apply"]
