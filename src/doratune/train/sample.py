"""What a language model writes, as a sample before and after training."""

from __future__ import annotations

from typing import Any

import torch


def continuation(model: Any, tokenizer: Any, prompt: str, tokens: int) -> str:
    """What the model writes after a prompt, the likeliest token at each step."""
    was_training = model.training
    model.eval()
    try:
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        with torch.inference_mode():
            out = model.generate(
                **inputs,
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
    text: str = tokenizer.decode(out[0][inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text
