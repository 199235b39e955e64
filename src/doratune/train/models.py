"""Base models and tokenizers from a folder or the hub, with errors that say what to do."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from doratune.errors import AdapterError, first_line
from doratune.extras import require
from doratune.files import read_config, read_weights
from doratune.ops.hardware import multiplies
from doratune.targets import HEAD_NAMES
from doratune.train.choices import Dtype
from doratune.train.information import Information
from doratune.train.model_names import NAMELESS, base_name, is_model, model_problem

LOADERS = {
    "text-generation": "AutoModelForCausalLM",
    "text-classification": "AutoModelForSequenceClassification",
    "image-classification": "AutoModelForImageClassification",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
}
"""transformers' class for each task of ``doratune train``, and for PEFT's task types."""
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation of red, green and blue, as most vision models but the first ViT were pretrained with."""
TOKENIZER_FILES = ("*token*", "vocab*", "*.model", "*.gguf")
"""Without any of these a folder has no tokenizer."""
PREPROCESSOR = "preprocessor_config.json"
"""How images become a model's input."""
SAVED_HEAD = re.compile(r"(^|\.)(score|classifier|classification_head)(\.out_proj)?\.weight$")
"""Names of the weight that gives the logits, in an adapter's file. Its rows are the classes."""
CLASSIFIERS = ("text-classification", "image-classification", "SEQ_CLS")


def load_model(
    name: str,
    dtype: torch.dtype | str = "auto",
    task: str | None = "CAUSAL_LM",
    labels: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
) -> Any:
    """Load a transformers model.

    Args:
        name: folder, or name on the hub; a folder never needs a network.
        dtype: of the weights; "auto": as they are stored.
        task: a task of ``doratune train`` or PEFT's task type; None, or one not listed here: the class that the model's
            own config names.
        labels: names of the classes, for a classification head of that size; where the base has none such it is new.
        options: more arguments of transformers' ``from_pretrained``, such as ``quantization_config``.

    Raises:
        AdapterError: if there is no such model or it cannot be loaded.
    """
    return _load(name, dtype, task, labels, options)[0]


def load_writing(name: str, dtype: torch.dtype | str, options: Mapping[str, Any] | None = None) -> tuple[Any, set[str]]:
    """Load a causal language model as ``load_model`` does, and name the weights that its files do not hold."""
    return _load(name, dtype, "CAUSAL_LM", (), options)


def load_classifier(
    name: str, dtype: torch.dtype | str, task: str, labels: Sequence[str], options: Mapping[str, Any] | None = None
) -> tuple[Any, list[str]]:
    """Load a model with a head for these classes.

    Returns:
        The model, and the paths of the modules that have to be trained whole: the head, and what else is new.

    Raises:
        AdapterError: if there is no such model or it cannot be loaded, or no head is known for it.
    """
    model, new = _load(name, dtype, task, labels, options)
    heads = [path for path, _ in model.named_children() if path in HEAD_NAMES]
    modules = dict(model.named_modules())
    paths = sorted({key.rpartition(".")[0] for key in new})
    leaves = [p for p in paths if p and not list(modules[p].children()) and not p.startswith(tuple(heads))]
    if not heads and not leaves:
        raise AdapterError(
            f"model {name}: {type(model).__name__} has no head of a known name ({', '.join(HEAD_NAMES)})"
        )
    return model, [*heads, *leaves]


def load_base(
    folder: str | os.PathLike[str],
    base: str | None = None,
    dtype: torch.dtype | str = "auto",
    options: Mapping[str, Any] | None = None,
) -> Any:
    """Load the model that an adapter was trained on, with the head and labels that its folder tells of.

    Args:
        folder: of the adapter, or of a whole model that ``doratune train`` wrote.
        base: the base model; None: the one that the folder names.
        dtype: of the weights; "auto": as they are stored.
        options: more arguments of transformers' ``from_pretrained``.

    Raises:
        AdapterError: if the base is not named, or cannot be loaded.
    """
    folder = Path(folder)
    about = Information.load(folder)
    if is_model(folder):
        return load_model(str(folder), dtype, about.task if about else None, about.labels if about else (), options)
    name = base_name(folder, base)
    if name is None:
        raise AdapterError(NAMELESS.format(folder))
    if about is None:
        task = peft_task(read_config(folder))
        return load_model(name, dtype, task, saved_classes(folder, name) if task in CLASSIFIERS else (), options)
    return load_model(name, dtype, about.task, about.labels, options)


def peft_task(raw: Mapping[str, Any]) -> str | None:
    """The task of an adapter that PEFT wrote: where no task type was given it notes the model's class."""
    kind = (raw.get("auto_mapping") or {}).get("base_model_class") or ""
    ends = {"ForSequenceClassification": "SEQ_CLS", "ForImageClassification": "image-classification"}
    return raw.get("task_type") or next((task for end, task in ends.items() if kind.endswith(end)), None)


def saved_classes(folder: Path, base: str) -> list[str]:
    """Names for the classes of the head that lies with an adapter; none where there is no head, or the base's fits."""
    shapes = [tensor.shape for key, tensor in read_weights(folder)[0].items() if SAVED_HEAD.search(key)]
    if not shapes or shapes[0][0] == load_config(base).num_labels:  # the base may have better names
        return []
    return [f"LABEL_{number}" for number in range(shapes[0][0])]


def _load(
    name: str, dtype: torch.dtype | str, task: str | None, labels: Sequence[str], given: Mapping[str, Any] | None
) -> tuple[Any, set[str]]:
    """The model, and the names of weights that its files did not hold."""
    with _loading("model", name) as (transformers, source, options):
        kind = LOADERS.get(task or "")
        if kind is None:
            kind = (transformers.AutoConfig.from_pretrained(source, **options).architectures or ["AutoModel"])[0]
        more: dict[str, Any] = {"dtype": dtype, **options, **(given or {})}
        if labels and task in CLASSIFIERS:
            names = dict(enumerate(labels))
            more |= {"id2label": names, "label2id": {label: i for i, label in names.items()}}
            more |= {"num_labels": len(labels), "ignore_mismatched_sizes": True}
        if len(labels) > 1 and task in CLASSIFIERS:
            # The loss goes by it, and a base may have been trained for regression or several labels at once.
            more["problem_type"] = "single_label_classification"
        loader = getattr(transformers, kind)
        if task == "image-classification":
            loader = image_classifier(transformers.AutoConfig.from_pretrained(source, **options)) or loader
        model, found = loader.from_pretrained(source, output_loading_info=True, **more)
    if task != "image-classification" and labels and model.config.pad_token_id is None:
        end = model.config.eos_token_id  # language models classify the last token before the padding
        model.config.pad_token_id = end[0] if isinstance(end, list) else end
    return model, {*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])}


def _image_classifiers(config: Any) -> tuple[Any, ...]:
    """transformers' classes that classify images with a base of this kind."""
    kinds = require("transformers").MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING.get(type(config), ())
    return kinds if isinstance(kinds, tuple) else (kinds,)


def image_classifier(config: Any) -> Any:
    """The class that classifies images with a base of this kind; None: transformers has none."""
    return next(iter(_image_classifiers(config)), None)  # DeiT's others, distilled from a teacher, have no loss


def loader_name(task: str, config: Any) -> str:
    """transformers' class that loads such a model for a task of ``doratune train``, as users write it down."""
    several = task == "image-classification" and len(_image_classifiers(config)) > 1
    # Of several the Auto class may take another than we.
    return str(image_classifier(config).__name__) if several else LOADERS[task]


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer of any kind."""
    return any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES)


def load_tokenizer(name: str) -> Any:
    """Load a model's tokenizer.

    Raises:
        AdapterError: if there is none or it cannot be loaded.
    """
    with _loading("tokenizer", name) as (transformers, source, options):
        if options and not has_tokenizer(Path(source)):
            raise AdapterError(
                f"{name} holds no tokenizer (tokenizer.json, tokenizer_config.json): is it a language model?"
            )
        return transformers.AutoTokenizer.from_pretrained(source, **options)


def align_padding(model: Any, tokenizer: Any) -> None:
    """Tell a text classifier which token pads: language models classify the last one that is another.

    Its config may say something else, or nothing: those of Llama 3 and Qwen2.5 name other tokens than their tokenizers.
    Models of other kinds stay as they are.
    """
    if "SequenceClassification" not in type(model).__name__:
        return
    give_padding(tokenizer)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id


def give_padding(tokenizer: Any) -> None:
    """A tokenizer without a token that pads gets its end of text, what stands for the unknown, or its first token."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)


def load_config(name: str) -> Any:
    """Load a model's configuration, without its weights.

    Raises:
        AdapterError: if there is none or it cannot be loaded.
    """
    with _loading("model", name) as (transformers, source, options):
        return transformers.AutoConfig.from_pretrained(source, **options)


def context_length(config: Any) -> int | None:
    """Tokens that a model of this configuration takes; None: it does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def check_context(config: Any, model: str, tokens: int) -> None:
    """Refuse sequences longer than a model has positions for.

    Raises:
        AdapterError: if it has fewer than these tokens.
    """
    longest = context_length(config)
    if longest and tokens > longest:
        raise AdapterError(f"tokens is {tokens}, but {model} takes sequences of {longest} at most; use fewer --tokens")


def load_image_processor(name: str, size: int | None = None) -> Any:
    """Load what turns images into a vision model's input; a folder without one gets ViT's, at the model's own size.

    Args:
        name: of the model.
        size: height and width in pixels; None: as the processor says.

    Raises:
        AdapterError: if it cannot be loaded, or the model takes no images.
    """
    config = load_config(name)
    if not hasattr(config, "patch_size") or not hasattr(config, "num_channels"):
        problem = "is not among the image models served" if image_classifier(config) else "takes no images"
        raise AdapterError(f"model {name}: a {config.model_type} {problem}; name a ViT, DINOv2 or Swin")
    with _loading("image processor", name) as (transformers, source, options):
        if options and not (Path(source) / PREPROCESSOR).is_file():
            own = size or config.image_size
            height, width = (own, own) if isinstance(own, int) else own
            mean, deviation = ((0.5,) * 3, (0.5,) * 3) if config.model_type == "vit" else IMAGENET
            size_option = {"height": height, "width": width}
            return transformers.ViTImageProcessor(size=size_option, image_mean=mean, image_std=deviation)
        processor = transformers.AutoImageProcessor.from_pretrained(source, **options)
    if size is not None:
        processor.size = {"height": size, "width": size}
        processor.do_center_crop = False
    return processor


def choose_dtype(wanted: str, full: bool = False) -> torch.dtype:
    """The dtype of the base weights; "auto" by what the machine has.

    Raises:
        AdapterError: for other names, and for float16 without a GPU, where it is slow and overflows.
    """
    if wanted not in get_args(Dtype):
        raise AdapterError(f"dtype must be one of {', '.join(get_args(Dtype))}; found {wanted!r}")
    gpu = torch.cuda.is_available()
    if wanted == "auto":
        return torch.bfloat16 if gpu and not full and multiplies_bfloat16() else torch.float32
    if wanted == "float16" and not gpu:
        raise AdapterError("dtype float16 needs a GPU; use bfloat16 or float32")
    return getattr(torch, wanted)


def multiplies_bfloat16() -> bool:
    """Whether the GPU does: a T4 or V100 has the dtype, but computes in it by detours, slower than in float32."""
    return multiplies(torch.bfloat16, torch.device("cuda"))


@contextlib.contextmanager
def _loading(what: str, name: str) -> Iterator[tuple[Any, str, dict[str, Any]]]:
    """transformers, where it finds a model, and its options for that; whatever goes wrong then is an AdapterError."""
    transformers = require("transformers")
    folder = Path(name).expanduser()
    local = folder.is_dir()
    beside_adapter = local and what == "tokenizer"  # which has no config.json of a model
    if not beside_adapter and (problem := model_problem(name)):
        raise AdapterError(problem)
    try:
        yield (transformers, str(folder), {"local_files_only": True}) if local else (transformers, name, {})
    except AdapterError:
        raise
    except Exception as error:  # whatever a broken folder, an absent file or an absent network makes it raise
        advice = "the folder may be incomplete"
        if "Unrecognized configuration class" in str(error):
            advice = "a model of another kind than is needed here"
        elif "attn_implementation" in str(error) or "FlashAttention" in str(error):
            advice = "attention: choose another, or none"
        elif not local:
            advice = f"there is no folder {folder.absolute()}, so it was looked for on the model hub; without a "
            advice += "network, name the folder of a downloaded model"
        raise AdapterError(f"{what} {name} could not be loaded: {first_line(error)} ({advice})") from error
