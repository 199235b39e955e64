"""What PEFT's options cannot say of an adapter: it stands in the metadata of the weights."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

from doratune.config import AdapterConfig
from doratune.errors import AdapterError

METADATA = "doratune"
"""Key in the weights' metadata."""
OPTIONS = ("norm_gradient", "norm_refresh", "eight_bit_outputs", "init")


def metadata_of(config: AdapterConfig, magnitude_only: Iterable[str]) -> dict[str, str]:
    """The metadata of an adapter's weights; the paths are those of layers of rank 0, which PEFT does not know."""
    own = {"magnitude_only": sorted(magnitude_only), **{name: getattr(config, name) for name in OPTIONS}}
    return {METADATA: json.dumps(own)}


def with_own_options(config: AdapterConfig, metadata: Mapping[str, str]) -> AdapterConfig:
    """PEFT's options of a file, and what its metadata adds to them.

    Raises:
        AdapterError: if that is not what doratune writes.
    """
    try:
        own = json.loads(metadata.get(METADATA, "{}"))
        ranks = {f"^{re.escape(path)}": 0 for path in own.get("magnitude_only", [])}
        others = {key: rank for key, rank in config.rank_pattern.items() if key not in ranks}
        given = {name: own[name] for name in OPTIONS if name in own}
        return replace(config, rank_pattern={**ranks, **others}, **given)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise AdapterError(f"metadata {METADATA!r}: {error}") from error
