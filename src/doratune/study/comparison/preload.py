"""What a process that trains needs, imported once by the server that forks it, and without what libraries say then."""

import importlib
import logging

from doratune.train.quiet import quiet_libraries

logging.basicConfig(level=logging.ERROR)
quiet_libraries()
for name in ("callbacks", "interruption", "run", "trainer"):
    importlib.import_module(f"doratune.train.{name}")
importlib.import_module("doratune.train.trainer").AdapterTrainer  # noqa: B018  (made when it is first asked for)
