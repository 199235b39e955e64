from transformers import (
    BartConfig,
    BartForSequenceClassification,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    T5ForSequenceClassification,
)

from doratune.cli.probe import logits, random_inputs
from train.tiny import llama


def test_models_with_an_encoder_a_decoder_or_both_are_probed():
    sizes = {"vocab_size": 32, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    for model in (llama(), T5EncoderModel(T5Config(**sizes)), T5ForConditionalGeneration(T5Config(**sizes))):
        assert logits(model, random_inputs(model)).shape[:2] == (2, 32)


def test_classifiers_that_read_the_class_at_the_end_of_a_text_are_probed():
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    bart = BartConfig(vocab_size=32, d_model=8, encoder_layers=1, decoder_layers=1, num_labels=3, **heads)
    t5 = T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, num_labels=3)
    for model in (BartForSequenceClassification(bart), T5ForSequenceClassification(t5)):
        assert logits(model.eval(), random_inputs(model)).shape == (2, 3)
