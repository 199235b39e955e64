"""A tiny language model in a folder, with a chat template, and adapters of it that change what it writes."""

import torch

import doratune as dt
from train.tiny import llama, tokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def save_writer(folder, template=TEMPLATE):
    words = tokenizer()
    words.chat_template = template
    llama().save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def save_moved(folder, base, seed=1, method="dora"):
    """An adapter far enough from its start to change every text."""
    model = dt.attach(llama(), dt.AdapterConfig(rank=4, method=method))
    model.name_or_path = str(base) if base else ""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in dt.trainable_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.5)
    dt.save_adapter(model, folder)
    return folder
