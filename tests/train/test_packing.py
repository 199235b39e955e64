import pytest
import torch

import doratune as dt
from doratune.train import TrainConfig, train
from doratune.train.packing import refuse_leaks
from train.tiny import llama, save_rows, tokenizer


def opt():
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "ffn_dim": 32, "word_embed_proj_dim": 16}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 128}
    model = OPTForCausalLM(OPTConfig(vocab_size=257, pad_token_id=256, bos_token_id=256, **sizes, **layers))
    with torch.no_grad():
        for parameter in model.parameters():  # so small a model's start values hardly let tokens see each other
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_keeps_them_apart(dtype):
    refuse_leaks(llama().to(dtype), "llama")


def test_packing_is_refused_where_examples_see_each_other(tmp_path):
    opt().save_pretrained(tmp_path / "opt")
    tokenizer().save_pretrained(tmp_path / "opt")
    data = save_rows(tmp_path / "rows.jsonl", [{"prompt": f"a{i} ", "completion": "b"} for i in range(20)])
    config = TrainConfig(model=str(tmp_path / "opt"), data=(str(data),), output=tmp_path / "run", steps=1)
    config.packing, config.max_length = True, 32
    with pytest.raises(dt.AdapterError, match=r"see those before them .*\(opt\); leave packing out"):
        train(config)
    assert not (tmp_path / "run").exists()
    config.packing = False
    assert train(config).steps == 1
