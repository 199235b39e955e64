from transformers import T5Config, T5EncoderModel, T5ForConditionalGeneration

from doratune.cli.probe import logits, random_inputs
from train.tiny import llama


def test_models_with_an_encoder_a_decoder_or_both_are_probed():
    sizes = {"vocab_size": 32, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    for model in (llama(), T5EncoderModel(T5Config(**sizes)), T5ForConditionalGeneration(T5Config(**sizes))):
        assert logits(model, random_inputs(model)).shape[:2] == (2, 32)
