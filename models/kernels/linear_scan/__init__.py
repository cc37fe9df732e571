"""Diagonal linear recurrences y_t = a_t y_{t-1} + b_t."""

from models.kernels.linear_scan.interface import linear_scan

__all__ = ["linear_scan"]
