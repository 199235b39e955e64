"""Studying adapters: how magnitude and direction move, what a file holds, what a run looked like."""

from doratune.study.decompose import Decomposition, adapter_change, decompose

__all__ = ["Decomposition", "adapter_change", "decompose"]
