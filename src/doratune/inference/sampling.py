"""How the next token is chosen: options shared by Python and the command line."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

SEEDS = 2**32
"""Seeds there are, 0 the first: more than these NumPy's generator does not take."""


@dataclass
class Sampling:
    """How the next token is chosen."""

    max_tokens: int = 200
    """Tokens to write at most; no more than the model's context holds."""
    temperature: float = 0.0
    """0: always the likeliest token; higher: more variety."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that have this probability together."""
    top_k: int = 0
    """Sample from this many of the likeliest tokens; 0: from all."""
    repetition_penalty: float = 1.0
    """Above 1: tokens that were there before become less likely."""
    seed: int = 0
    """Of the sampling."""

    def problems(self) -> Iterator[str]:
        """Values that cannot work."""
        if self.max_tokens < 1:
            yield f"max_tokens must be above 0; found {self.max_tokens}"
        if not 0 < self.top_p <= 1:
            yield f"top_p must lie above 0 and not above 1; found {self.top_p}"
        if not 0 < self.repetition_penalty < float("inf"):
            yield f"repetition_penalty must be above 0; found {self.repetition_penalty}"
        for name in ("temperature", "top_k", "seed"):
            if not 0 <= getattr(self, name) < float("inf"):
                yield f"{name} must be at least 0; found {getattr(self, name)}"
        if SEEDS <= self.seed < float("inf"):
            yield f"seed must be below 2**32; found {self.seed}"
        vain = [name for name in ("top_p", "top_k", "seed") if getattr(self, name) != getattr(Sampling, name)]
        if self.temperature == 0 and vain:
            yield f"{', '.join(vain)}: without effect at temperature 0, the likeliest token; raise --temperature"

    def later(self, number: int) -> Sampling:
        """The same for what is drawn so many texts later: with this seed equal prompts would get equal texts."""
        return replace(self, seed=(self.seed + number) % SEEDS)

    def options(self, room: int | None = None) -> dict[str, Any]:
        """As transformers' ``generate`` wants it; what a model's own settings say about sampling is overridden.

        Args:
            room: tokens that the model's context has left; None: without end.
        """
        sample = self.temperature > 0
        return {
            "max_new_tokens": self.max_tokens if room is None else min(self.max_tokens, room),
            "do_sample": sample,
            "temperature": self.temperature if sample else None,
            "top_p": self.top_p if sample else None,
            "top_k": self.top_k or None if sample else None,
            **dict.fromkeys(("min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")),
            "repetition_penalty": self.repetition_penalty,
            "num_beams": 1,
            "num_return_sequences": 1,
            "return_dict_in_generate": False,
            "use_cache": True,
        }
