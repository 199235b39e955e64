"""What a process that trains needs, imported once by the server that forks it, and without what libraries say then."""

import gc
import importlib
import logging

from doratune.train.quiet import quiet_libraries

logging.basicConfig(level=logging.ERROR)
quiet_libraries()
for name in ("callbacks", "interruption", "run", "trainer"):
    importlib.import_module(f"doratune.train.{name}")
importlib.import_module("doratune.train.trainer").AdapterTrainer  # noqa: B018  (made when it is first asked for)
importlib.import_module("matplotlib.backends.backend_agg")  # each run draws its curves
gc.freeze()  # or each run's collections would go through all of it, and copy it from the server's memory
