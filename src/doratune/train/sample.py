"""What a language model writes, as a sample before and after training."""

from __future__ import annotations

from typing import Any

import torch

from doratune.errors import AdapterError
from doratune.train.models import context_length
from doratune.train.tokens import opening, written


def continuation(model: Any, tokenizer: Any, prompt: str, tokens: int) -> str:
    """What the model writes after a prompt, the likeliest token at each step; no more than its context holds.

    Raises:
        AdapterError: if the prompt fills the context.
    """
    ids = opening(prompt, tokenizer)
    context = context_length(model.config)
    if context and len(ids) >= context:
        raise AdapterError(f"prompt: found {len(ids)} tokens, the model's context is {context}; shorten it")
    if context:
        tokens = min(tokens, context - len(ids))
    was_training = model.training
    model.eval()
    try:
        inputs = torch.tensor([ids], device=model.device)
        with torch.inference_mode():
            out = model.generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                use_cache=True,
                pad_token_id=tokenizer.eos_token_id,
            )
    finally:
        model.train(was_training)
    return written(ids, out[0][len(ids) :].tolist(), tokenizer)
