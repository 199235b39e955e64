"""Whether a model keeps packed examples apart: not all heed positions that start anew."""

from __future__ import annotations

from typing import Any

import torch

from doratune.errors import AdapterError

LENGTH = 8
"""Tokens of each example that is tried."""
NOISE = 0.1
"""Of the logits' deviation: rounding changes less, an example that is seen more."""


def refuse_leaks(model: Any, name: str) -> None:
    """Pack one example behind two others: what the model makes of it has to be the same.

    Raises:
        AdapterError: if it is not.
    """
    one, other, last = (torch.arange(3 * LENGTH) % model.config.get_text_config().vocab_size).split(LENGTH)
    ids = torch.stack([torch.cat([one, last]), torch.cat([other, last])]).to(model.device)
    positions = torch.arange(LENGTH, device=model.device).repeat(2, 2)
    with torch.no_grad():
        logits = model.eval()(input_ids=ids, position_ids=positions, use_cache=False).logits[:, LENGTH:].float()
    if (logits[0] - logits[1]).abs().max() > NOISE * logits.std():
        raise AdapterError(
            f"model {name}: packed examples see those before them in models of this kind ({model.config.model_type}); "
            "leave packing out (--packing False)"
        )
