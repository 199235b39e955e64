"""PEFT's DoRA layers, served by doratune's functions in place: ``accelerate`` one model, or ``install`` for all.

    import doratune as dt

    handle = dt.peft.accelerate(peft_model)
    print(handle.report)
    handle.undo()

Parameters, names, files and everything else about the model stay PEFT's; only the arithmetic of a layer's forward and
backward pass changes. What doratune does not serve, PEFT computes as before.
"""

from doratune.interop.peft.report import LayerReport, Report, report
from doratune.interop.peft.switch import Handle, accelerate, install, uninstall

__all__ = ["Handle", "LayerReport", "Report", "accelerate", "install", "report", "uninstall"]
