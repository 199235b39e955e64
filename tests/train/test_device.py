import pytest
import torch

import doratune as dt
from doratune.train.device import to_device


class TooLarge(torch.nn.Module):
    def to(self, *_):
        raise torch.OutOfMemoryError("no memory")


def test_a_model_that_does_not_fit_is_explained(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(dt.AdapterError, match="out of memory; the model does not fit"):
        to_device(TooLarge())
    quantised = TooLarge()
    quantised.is_quantized = True
    assert to_device(quantised) is quantised, "it stays where it was loaded"
