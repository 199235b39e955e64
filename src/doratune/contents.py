"""What an adapter's file holds, sorted by module and checked against the model before anything is changed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from doratune.config import AdapterConfig, vain_options
from doratune.errors import AdapterError
from doratune.layers import Kind, kind_of
from doratune.layers.attention import Projection
from doratune.layers.experts import ExpertProjection
from doratune.layers.weights import on_device
from doratune.own_options import with_own_options
from doratune.peft_config import PeftOptions, saved_by_peft
from doratune.peft_experts import expert_counts, from_parameters
from doratune.renamed import todays_names
from doratune.targets import outermost, plain_modules, plain_path, refusal

PREFIX = "base_model.model."
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
BIAS = "base_layer.bias"
PARTS = (
    "lora_A.weight",
    "lora_B.weight",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
    BIAS,
    "base_layer.weight",
)
KEY = re.compile(rf"(?P<path>.+)\.(?P<part>{'|'.join(re.escape(p) for p in PARTS)})(?:(?<=vector)\.weight)?", re.DOTALL)


@dataclass
class Contents:
    """A file's tensors, sorted by the module they belong to, and what is wrong with them."""

    config: AdapterConfig
    layers: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    saved: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    whole: set[str] = field(default_factory=set)
    """Paths of modules that are saved whole; of the others in ``saved`` only biases are."""
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Spelling:
    """How messages call a tensor, and its shape, whose key in PEFT's format is given: as the file itself does."""

    key: Callable[[str], str] = str
    shape: Callable[[Iterable[int]], tuple[int, ...]] = tuple


PEFTS = Spelling()


def read_contents(
    root: nn.Module,
    options: PeftOptions,
    tensors: dict[str, Tensor],
    metadata: dict[str, str],
    spelling: Spelling = PEFTS,
) -> Contents:
    """Sort a file's tensors and compare them with the model and the options, collecting every problem."""
    return _Reader(root, options, spelling).read(tensors, metadata)


class _Reader:
    def __init__(self, root: nn.Module, options: PeftOptions, spelling: Spelling) -> None:
        self.root = root
        self.spelling = spelling
        self.modules = plain_modules(root)
        self.targeted = options.targeted(root)
        self.own_type = options.own_type
        whole = set(outermost(saved_by_peft(options.config.modules_to_save, self.modules)))
        self.whole = {path: self.modules[path].state_dict() for path in whole}
        self.contents = Contents(options.config, whole=whole)
        self.problems = self.contents.problems

    def read(self, tensors: dict[str, Tensor], metadata: dict[str, str]) -> Contents:
        try:
            self.contents.config = with_own_options(self.contents.config, metadata)
        except AdapterError as error:
            self.problems += error.problems
        if not self.own_type:
            tensors = from_parameters(tensors, expert_counts(self.modules, self.targeted))
        for key, tensor in self._under_todays_names(tensors).items():
            problem = self._sort(key, tensor)
            if problem:
                self._report(key, problem)
        for path in sorted(self.targeted | self.contents.layers.keys()):
            self._check_layer(path)
        self._check_saved()
        elsewhere = self._elsewhere()
        if elsewhere:
            self.problems.insert(0, elsewhere)
        return self.contents

    def _report(self, key: str, problem: str) -> None:
        self.problems.append(f"{self.spelling.key(key)}: {problem}")

    def _elsewhere(self) -> str | None:
        """What is likely meant where the file's layers are the model's, all of them under another prefix."""
        layers = list(self.contents.layers)
        if not layers or layers[0] in self.modules:
            return None
        for path in self.modules:
            above, below = layers[0].removesuffix(f".{path}"), path.removesuffix(f".{layers[0]}")
            if above != layers[0] and {p.removeprefix(f"{above}.") for p in layers} <= self.modules.keys():
                return f"its layers lie under {above!r}, where its model held this one: load it there, or save the part"
            if below != path and {f"{below}.{p}" for p in layers} <= self.modules.keys():
                return f"its layers are those of {below!r} of the model: load it into that part"
        return None

    # Sorting

    def _under_todays_names(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a file from an older transformers under the names that the model has now."""
        matches = {key: KEY.fullmatch(plain_path(key.removeprefix(PREFIX))) for key in tensors}
        paths = {match["path"] for match in matches.values() if match}
        names = todays_names(self.root, paths, self.modules)
        if not names:
            return tensors
        self.targeted = {names.get(path, path) for path in paths}  # the options have the old names, too
        for option, entry in vain_options(self.contents.config, self.targeted):
            self.problems.append(f"{option} {entry!r}: fits no layer under the names of this transformers")
        return {
            f"{PREFIX}{names[match['path']]}.{match['part']}" if match and match["path"] in names else key: tensors[key]
            for key, match in matches.items()
        }

    def _sort(self, key: str, tensor: Tensor) -> str | None:
        """Put one tensor where it belongs; the problem with it, if any."""
        if not key.startswith(PREFIX):
            return f"unknown key; expected it to start with {PREFIX!r}"
        inner = plain_path(key.removeprefix(PREFIX))
        owner = next((path for path in self.whole if inner.startswith(path + ".")), None)
        module, _, name = inner.rpartition(".")
        match = KEY.fullmatch(inner)
        base = self.modules.get(module)
        all_biases = self.contents.config.bias == "all"
        if owner is not None:
            name = inner.removeprefix(owner + ".")
            if name in self.whole[owner]:
                return self._keep(self.contents.saved, owner, name, tensor, like=self.whole[owner][name])
            wrapper, _, inside = name.partition(".")
            repeated = inside in self.modules[owner]._parameters or (all_biases and inside.endswith("bias"))
            if repeated and wrapper in ("original_module", "modules_to_save"):
                return None  # PEFT repeats embeddings of a resized model, and biases, under names of its own wrapper
        elif all_biases and module not in {"", *self.targeted} and "bias" in name and name in _parameters(base):
            return self._keep(self.contents.saved, module, name, tensor)
        elif all_biases and name == "bias" and module not in self.targeted and _is_output(base):
            return self._keep(self.contents.saved, module.rpartition(".")[0], "out_proj.bias", tensor)
        elif match:
            return self._keep(self.contents.layers, match["path"], match["part"], tensor)
        own = _parameters(base).get(name, getattr(base, "_buffers", {}).get(name))
        if own is None:
            return "unknown key; nothing in the model or the options corresponds to it"
        return None if _same(tensor, own) else REPLACES

    def _keep(
        self,
        group: dict[str, dict[str, Tensor]],
        path: str,
        name: str,
        tensor: Tensor,
        like: Tensor | None = None,
    ) -> str | None:
        problem = None
        allowed = FLOATS if like is None or like.is_floating_point() else (like.dtype,)
        if name in group.setdefault(path, {}):
            problem = "the file holds this tensor twice, under two keys"
        elif tensor.dtype not in allowed:
            names = [str(dtype).removeprefix("torch.") for dtype in (*allowed, tensor.dtype)]
            problem = f"expected {' or '.join(names[:-1])}, found {names[-1]}"
        elif not torch.isfinite(tensor).all():
            problem = "holds NaN or infinite values"
        group[path][name] = tensor
        return problem

    # Checking

    def _check_layer(self, path: str) -> None:
        module = self.modules.get(path)
        kind = None if module is None else kind_of(module)
        problem = None
        if module is None:
            problem = "the model has no such module; is the file of another model?"
            single = re.search(r"\.experts\.\d+\.", path)  # first: a file may hold tens of thousands of these
            if single and any(isinstance(other, ExpertProjection) for other in self.modules.values()):
                problem = f"the model has no such module: {SINGLE_EXPERTS}"
        elif path not in self.contents.layers:
            problem = "the options target it, but the file has no tensors for it"
        elif path not in self.targeted:
            problem = "the file has tensors for it, but the options do not target it"
        else:
            problem = refusal(self.modules, path)
        if not problem and module is not None and kind is not None:
            problem = None if self.own_type else kind.file_refusal(module, self.contents.config)
            problem = problem or kind.config_refusal(self.contents.config)
            with on_device(module):
                if kind.rows(module).stored.is_meta:
                    problem = "the model holds no data yet (meta device); load the base model first"
                elif not problem:
                    self._check_parts(path, module, kind)
        if problem:
            self.problems.append(f"{path}: {problem}")

    def _check_parts(self, path: str, base: nn.Module, kind: Kind) -> None:
        config, parts = self.contents.config, self.contents.layers[path]
        rows = kind.rows(base)
        out, columns = rows.shape
        rank = max(1, config.rank_of(path))
        a, b, m = kind.file_names
        like: dict[str, tuple[int, ...]] = {a: (rows.matrices * rank, columns), b: (out, rank)}
        if config.method == "dora":
            like[m] = (out,)
        if config.bias != "none" and getattr(base, "bias", None) is not None:
            like[BIAS] = (out,)
        before = len(self.problems)
        for part, shape in like.items():
            if part not in parts:
                self._report(f"{PREFIX}{path}.{part}", "missing")
                continue
            if part != BIAS:
                shape = tuple(kind.to_file(base, part, torch.empty(shape, device="meta")).shape)
            self._check_shape(f"{PREFIX}{path}.{part}", parts[part], shape)
        for part in sorted(parts.keys() - like.keys()):
            if part == "base_layer.weight" and _same(parts[part], getattr(base, "weight", None)):
                continue  # PEFT adds the table of an adapted embedding; the model's own is the same
            self._report(f"{PREFIX}{path}.{part}", _why_unexpected(part, config))
        if len(self.problems) == before and config.rank_of(path) == 0:
            B, magnitude = kind.from_file(base, b, parts[b]), kind.from_file(base, m, parts[m])
            if B[magnitude != 0].any():
                self._report(f"{PREFIX}{path}.{b}", "the metadata says magnitude only, so expected 0")

    def _check_shape(self, key: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
        if tuple(tensor.shape) != expected:
            shape = self.spelling.shape
            self._report(key, f"expected shape {shape(expected)}, found {shape(tensor.shape)}")

    def _check_saved(self) -> None:
        saved = self.contents.saved
        for path, state in saved.items():
            for name, tensor in state.items():
                own = self.whole[path][name] if path in self.whole else self.modules[path].get_parameter(name)
                self._check_shape(f"{PREFIX}{path}.{name}", tensor, tuple(own.shape))
        expected = {f"{path}.{name}" for path, own in self.whole.items() for name in own}
        if self.contents.config.bias == "all":
            inside = tuple(path + "." for path in self.whole)
            expected |= {
                f"{path}.bias"
                for path, module in self.modules.items()
                if path and module._parameters.get("bias") is not None
                if path not in self.targeted and not path.startswith(inside)
            } - {f"{path}.bias" for path in self.whole}
        found = {f"{path}.{name}" for path, state in saved.items() for name in state}
        for key in sorted(expected - found):
            self._report(PREFIX + key, "missing")


def _parameters(module: nn.Module | None) -> dict[str, nn.Parameter | None]:
    return {} if module is None else module._parameters


def _is_output(module: nn.Module | None) -> bool:
    """Whether this is the output projection, with a bias, of an ``nn.MultiheadAttention``."""
    return isinstance(module, Projection) and module.name == "out_proj" and module.bias is not None


SINGLE_EXPERTS = (
    "transformers 5 keeps all experts in one parameter; PEFT converts plain LoRA: load the file there and save it again"
)
REPLACES = "a weight of the base model that differs from the model's own; an adapter's file may not replace it"


def _why_unexpected(part: str, config: AdapterConfig) -> str:
    if part == "base_layer.weight":
        return REPLACES
    if part == "lora_magnitude_vector":
        return "a magnitude, but use_dora is not set"
    if part == BIAS:
        return f"a bias, but bias is {config.bias!r} or the layer has none"
    return "does not belong to a layer of this kind"


def _same(stored: Tensor, own: Tensor | None) -> bool:
    if own is None or own.is_meta or stored.shape != own.shape:
        return False
    return torch.equal(stored.to(own.dtype), own.detach().cpu())
