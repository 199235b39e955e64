"""What a language model writes, as a sample before and after training."""

from __future__ import annotations

from typing import Any

import torch

from doratune.train.tokens import opening, written


def continuation(model: Any, tokenizer: Any, prompt: str, tokens: int) -> str:
    """What the model writes after a prompt, the likeliest token at each step."""
    was_training = model.training
    model.eval()
    try:
        ids = opening(prompt, tokenizer)
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
