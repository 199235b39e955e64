"""Other libraries' bars and notes, switched off where doratune shows its own."""

from __future__ import annotations

import logging

from doratune.extras import require


def quiet_libraries() -> None:
    """Only errors of transformers and datasets, and none of their progress bars."""
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # torchao, when transformers imports it
    notes = require("transformers.utils.logging")
    notes.set_verbosity_error()
    notes.disable_progress_bar()
    datasets = require("datasets")
    datasets.disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # of all attempts to reach it, the last is told
