"""doratune.json: what something trained is for, beside an adapter or in a model's folder.

PEFT's files say nothing about labels, image sizes or the task; ``doratune predict`` and ``evaluate`` need them.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from doratune.errors import AdapterError
from doratune.files import write_whole

FILE = "doratune.json"


@dataclass(frozen=True)
class Information:
    """What a run noted about its result."""

    task: str
    """text-generation, text-classification or image-classification."""
    base: str
    """Base model: a folder or a name on the hub."""
    method: str
    """dora, lora, magnitude: the folder is an adapter; full, head: it is a whole model."""
    labels: tuple[str, ...] = ()
    """Names of the classes; the place of a name is the number of its logit."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Columns of the data that were trained on, by what they were: text, label, image, ..."""
    prompt_template: str | None = None
    """What prompts were made with, out of several columns."""
    as_chat: bool | None = None
    """Whether prompts and completions were put into the chat template."""
    loss_on: str | None = None
    """Where there was a prompt or chat: what the loss was taken on, completion or all."""
    max_length: int | None = None
    """Tokens at which texts were cut."""
    packing: bool | None = None
    """Whether several texts were put into one block; None: documents were, prompts and chats were not."""
    image_size: tuple[int, int] | None = None
    """Height and width that the model was trained on; the folder's preprocessor_config.json says how to get there."""
    forward: Mapping[str, Any] = field(default_factory=dict)
    """Arguments that the model's forward needs besides its inputs, such as ``interpolate_pos_encoding``."""
    dtype: str = "auto"
    """Of the base's weights, as it was asked for; auto: by what the machine had."""
    quantize: str | None = None
    """How the base was quantised: a kind of ``doratune train``."""
    double_quant: bool = True
    """nf4: whether its scales were quantised, too."""

    def save(self, folder: Path) -> None:
        """Write ``doratune.json``."""
        text = json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"
        write_whole(folder / FILE, text)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Information | None:
        """Read a folder's ``doratune.json``; None if it has none.

        Raises:
            AdapterError: if the file is broken.
        """
        path = Path(folder) / FILE
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            known = {field.name: raw[field.name] for field in dataclasses.fields(cls) if field.name in raw}
            found = cls(**known)
            size = None if found.image_size is None else (int(found.image_size[0]), int(found.image_size[1]))
            return dataclasses.replace(found, labels=tuple(map(str, found.labels)), image_size=size)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, LookupError) as error:
            raise AdapterError(f"{path} cannot be read: {error}") from error
