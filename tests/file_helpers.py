"""Small random models, and adapters on them that have moved, for the tests of files."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import doratune as dt

IDS = torch.arange(12).view(2, 6) * 5 % 61


class Mlp(nn.Module):
    """Linear layers, one of them without bias, and a head with buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(61, 8)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"lin": nn.Linear(8, 8, bias=i > 0), "norm": nn.LayerNorm(8)}) for i in range(3)
        )
        self.body = nn.Linear(8, 6)
        self.head = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids).mean(1)
        for layer in self.layers:
            x = x + torch.tanh(layer["norm"](layer["lin"](x)))
        return self.head(self.body(x))


class Convolutions(nn.Sequential):
    """Two kinds of convolutions, on an image made of the ids."""

    def __init__(self) -> None:
        conv = nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 1, stride=2), nn.Tanh(), nn.Flatten(2)
        super().__init__(*conv, nn.Conv1d(4, 2, 3))

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids.view(1, 2, 2, 3).repeat(1, 1, 4, 4) / 30 - 1)


def llama(tie: bool = False) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=61,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
            tie_word_embeddings=tie,
            attention_bias=True,
        )
    )


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=61, n_positions=32, n_embd=16, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    )


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(
            vocab_size=61,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=24,
            max_position_embeddings=32,
            num_labels=3,
        )
    )


def distilbert() -> nn.Module:
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    return DistilBertForSequenceClassification(
        DistilBertConfig(
            vocab_size=61, dim=16, n_layers=2, n_heads=4, hidden_dim=24, max_position_embeddings=32, num_labels=3
        )
    )


BUILDERS = {
    "mlp": Mlp,
    "convolutions": Convolutions,
    "llama": llama,
    "gpt2": gpt2,
    "bert": bert,
    "distilbert": distilbert,
}


TRANSFORMERS = ("llama", "gpt2", "bert", "distilbert")


def build(name: str, seed: int = 0) -> nn.Module:
    """A model with random weights, biases included, in evaluation mode."""
    torch.manual_seed(seed)
    model = BUILDERS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.mul_(8 if name in TRANSFORMERS else 1)  # from 0.02, so that attention is not flat
    return model.eval()


def output(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    """Logits."""
    result = model(ids)
    return getattr(result, "logits", result)


@torch.no_grad()
def move(model: nn.Module, seed: int = 1) -> nn.Module:
    """Move everything that trains, so that B is not 0, m is not n and a saved module not the base's."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if "magnitude" in name:
                parameter.mul_(1 + 0.2 * noise)
            else:
                parameter.add_(0.1 * noise)
    return model


def file_key(name: str) -> str:
    """The key in a file of a parameter here or in PEFT, by its name there."""
    name = name.removeprefix("base_model.model.")
    for here, there in {
        ".lora_A.default": ".lora_A.weight",
        ".lora_B.default": ".lora_B.weight",
        ".magnitude.default": ".lora_magnitude_vector",
        ".lora_magnitude_vector.default.weight": ".lora_magnitude_vector",
        ".lora_A.default.weight": ".lora_A.weight",
        ".lora_B.default.weight": ".lora_B.weight",
        ".lora_embedding_A.default": ".lora_embedding_A",
        ".lora_embedding_B.default": ".lora_embedding_B",
        ".adapter_bias.default": ".base_layer.bias",
    }.items():
        if name.endswith(here):
            name = name.removesuffix(here) + there
            break
    name = name.replace(".modules_to_save.default.", ".").replace(".copies.default.", ".")
    return "base_model.model." + name


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients of a loss by the key in the file."""
    model.zero_grad()
    output(model).square().mean().backward()
    found = {file_key(n): p.grad for n, p in model.named_parameters() if p.grad is not None}
    for path, layer in dt.targets.adapted_layers(model).items():
        if layer.kind.name == "embedding":
            for part in "AB":
                key = f"base_model.model.{path}."
                if f"{key}lora_{part}.weight" in found:
                    found[f"{key}lora_embedding_{part}"] = found.pop(f"{key}lora_{part}.weight")
    return found


def peft_model(base: nn.Module, **options: object) -> nn.Module:
    """A PeftModel whose adapter has moved."""
    import peft

    torch.manual_seed(3)
    return move(peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**options))).eval()


def save_peft(model: nn.Module, folder: Path) -> Path:
    """What PEFT writes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Setting `save_embedding_layers`")
        model.save_pretrained(folder)
    return folder


def load_peft(base: nn.Module, folder: Path, **options: object) -> nn.Module:
    """How PEFT reads a folder."""
    import peft

    return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder, **options).eval()


def tensors(folder: Path) -> dict[str, Tensor]:
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def metadata(folder: Path) -> dict[str, str]:
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return file.metadata()


def options(folder: Path) -> dict[str, object]:
    return json.loads((folder / "adapter_config.json").read_text())


def rewrite(folder: Path, change: dict[str, Tensor | None], also: dict[str, str] | None = None) -> Path:
    """Replace, add or (None) remove tensors of a file."""
    new = {**tensors(folder), **change}
    meta = {**metadata(folder), **(also or {})}
    save_file({k: t for k, t in new.items() if t is not None}, folder / "adapter_model.safetensors", meta)
    return folder


def rewrite_options(folder: Path, **change: object) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**options(folder), **change}))
    return folder


def state(model: nn.Module) -> dict[str, object]:
    """Everything about a model that a failure must leave as it was."""
    return {
        "modules": [(name, id(module), module.training) for name, module in model.named_modules()],
        "tensors": {
            name: (id(t), t.detach().clone(), t.requires_grad, t._version)
            for name, t in (*model.named_parameters(), *model.named_buffers())
        },
        "hooks": [len(module._forward_hooks) for module in model.modules()],
        "attributes": sorted(model.__dict__),
    }


def assert_unchanged(model: nn.Module, before: dict[str, object]) -> None:
    after = state(model)
    for key in ("modules", "hooks", "attributes"):
        assert after[key] == before[key]
    assert after["tensors"].keys() == before["tensors"].keys()
    for name, (identity, value, grad, _) in before["tensors"].items():
        assert after["tensors"][name][0] == identity
        assert torch.equal(after["tensors"][name][1], value), name
        assert after["tensors"][name][2] == grad, name
