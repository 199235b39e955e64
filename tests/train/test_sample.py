import pytest
import torch
from transformers import GPT2Config

import doratune as dt
from doratune.train.sample import continuation
from train.tiny import sentencepiece_tokenizer


class Model:
    """Writes "upon a", and notes what it was asked."""

    training, device = True, torch.device("cpu")
    config = GPT2Config(n_positions=4)

    def eval(self):
        self.training = False

    def train(self, mode):
        self.training = mode

    def generate(self, input_ids, attention_mask, **options):
        self.asked = input_ids.tolist(), attention_mask.tolist(), self.training
        self.tokens = options["max_new_tokens"]
        return torch.cat([input_ids, torch.tensor([[4, 5]])], 1)


def test_a_sample_begins_with_its_space_and_the_prompt_does_not_end():
    model = Model()
    assert continuation(model, sentencepiece_tokenizer(), "once", 2) == " upon a"
    assert model.asked == ([[1, 3]], [[1, 1]], False)
    assert model.training


def test_a_sample_fits_the_context():
    model = Model()
    for prompt, length in (("once", 2), ("once once", 1)):
        continuation(model, sentencepiece_tokenizer(), prompt, 60)
        assert model.tokens == length
    with pytest.raises(dt.AdapterError, match="prompt: found 4 tokens, the model's context is 4; shorten it"):
        continuation(model, sentencepiece_tokenizer(), "once once once", 60)
    assert model.training
