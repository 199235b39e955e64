import shutil

import pytest
import torch
from safetensors.torch import load_file

import doratune as dt
from doratune.inference.prompts import Prompt, chat
from doratune.inference.sampling import Sampling
from doratune.inference.sources import Sources, find_sources
from doratune.inference.writer import Writer, label
from inference.small import save_moved, save_writer
from train.tiny import llama, save_encoder, sentencepiece_tokenizer, tokenizer

SHORT = Sampling(max_tokens=8)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("assets")
    base = save_writer(folder / "model")
    adapters = {name: save_moved(folder / name, base, seed) for seed, name in enumerate(("one", "two"), 1)}
    return Sources(str(base), adapters)


@pytest.fixture
def writer(sources):
    return Writer.load(sources)


def likeliest(model, text, count):
    """Greedy decoding by hand, without any cache."""
    ids = torch.tensor([tokenizer()(text)["input_ids"]])
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return tokenizer().decode(ids[0, start:])


def test_each_adapter_and_the_base_write_what_their_models_write(writer, sources):
    assert writer.adapters == ["one", "two"]
    texts = {}
    for name in (None, "one", "two", "one", None):
        (found,) = writer.write([Prompt("once upon")], SHORT, name)
        assert texts.setdefault(name, found.text) == found.text, "switching back changes nothing"
        assert found.adapter == name
        assert found.tokens == 8 or found.ended
    assert len(set(texts.values())) == 3
    assert texts[None] == likeliest(llama().eval(), "once upon", 8)
    alone = dt.load_adapter(llama(), sources.adapters["two"]).eval()
    assert texts["two"] == likeliest(alone, "once upon", 8)


def test_a_batch_writes_what_single_prompts_do(writer):
    prompts = [Prompt("once"), Prompt("a wolf in the forest and a king"), chat("time")]
    together = writer.write(prompts, SHORT, "one")
    assert together == [writer.write([prompt], SHORT, "one")[0] for prompt in prompts]


def test_no_more_is_written_than_the_context_holds(writer):
    long = Prompt("x" * 120)  # of 128 tokens
    assert writer.write([long, Prompt("x")], Sampling(max_tokens=10**6), "one")[0].tokens <= 8


def test_adapters_have_the_names_of_their_folders_whatever_these_are(sources, writer, tmp_path):
    places = {"one": "runs/train/adapter", "two": "Märchen"}
    for name, place in places.items():
        shutil.copytree(sources.adapters[name], tmp_path / place)
    found = Writer.load(find_sources([str(tmp_path / place) for place in places.values()]))
    assert found.adapters == ["train", "Märchen"]
    for known, name in zip(places, found.adapters, strict=True):
        wrote, expected = (by.write([Prompt("once")], SHORT, n)[0] for by, n in ((found, name), (writer, known)))
        assert (wrote.text, wrote.adapter) == (expected.text, name)
    with pytest.raises(dt.AdapterError, match="no adapter 'one'; it has train, Märchen"):
        found.write([Prompt("once")], SHORT, "one")


def test_merged_writes_the_same(sources):
    one = Sources(sources.base, {"one": sources.adapters["one"]})
    merged = Writer.load(one, merged=True)
    assert merged.adapters == []
    unmerged = Writer.load(one).write([Prompt("king")], SHORT, "one")
    assert merged.write([Prompt("king")], SHORT) == unmerged, "the adapter's name is kept, too"
    with pytest.raises(dt.AdapterError, match="merging takes one adapter; found 2"):
        Writer.load(sources, merged=True)


def test_sampling_follows_its_seed(writer):
    def drawn(**options):
        return writer.write([Prompt("once")], Sampling(max_tokens=12, temperature=1.5, **options))[0].text

    assert drawn(seed=1) == drawn(seed=1)
    assert drawn(seed=1) != drawn(seed=2)
    greedy = writer.write([Prompt("once")], Sampling(max_tokens=12))[0].text
    assert drawn(top_k=1) == drawn(top_p=1e-6) == greedy
    assert drawn(seed=1) != greedy


def test_the_models_own_settings_do_not_make_it_sample(writer):
    expected = writer.write([Prompt("once")], SHORT)
    writer.model.generation_config.do_sample = True
    writer.model.generation_config.temperature = 5.0
    assert writer.write([Prompt("once")], SHORT) == expected


def test_a_text_ends_where_the_model_ends_it(writer):
    whole = writer.write([Prompt("once")], SHORT)[0]
    assert not whole.ended
    third = tokenizer()(whole.text)["input_ids"][2]
    writer.model.generation_config.eos_token_id = [256, third]
    cut = writer.write([Prompt("once")], SHORT)[0]
    assert cut.ended
    assert cut.tokens <= 2
    assert whole.text.startswith(cut.text)


def test_prompts_that_do_not_fit_are_listed(writer):
    with pytest.raises(dt.AdapterError) as caught:
        writer.write([Prompt("once"), Prompt("x" * 128), Prompt("")], SHORT)
    assert "prompt 2 has 128 tokens, the model's context is 128" in str(caught.value)
    assert "prompt 3 is empty" in str(caught.value)


def test_nothing_of_a_failure_stays(writer, monkeypatch):
    expected = writer.write([Prompt("once")], SHORT, "two")

    def fail(**_):
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(writer.model, "generate", fail)
        with pytest.raises(dt.AdapterError, match="out of memory; try a smaller batch_size"):
            writer.write([Prompt("once")], SHORT)
    assert writer.write([Prompt("once")], SHORT, "two") == expected


def test_a_model_that_does_not_write(sources, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(dt.AdapterError, match="holds no tokenizer"):
        Writer.load(Sources(str(tmp_path / "empty"), {}))


def test_a_model_whose_files_hold_no_head(sources, tmp_path):
    from transformers import AutoModel, BertLMHeadModel

    encoder = save_encoder(tmp_path / "encoder")
    with pytest.raises(dt.AdapterError, match=r"no weights of the head that writes \(cls.predictions"):
        Writer.load(Sources(str(encoder), {}))
    BertLMHeadModel.from_pretrained(encoder, is_decoder=True).save_pretrained(encoder)
    assert Writer.load(Sources(str(encoder), {})).adapters == []
    inner = AutoModel.from_pretrained(sources.base)
    tokenizer().save_pretrained(tmp_path / "inner")
    inner.save_pretrained(tmp_path / "inner")
    tied = Writer.load(Sources(str(tmp_path / "inner"), {})).write([Prompt("once")], SHORT)
    assert tied == Writer.load(Sources(sources.base, {})).write([Prompt("once")], SHORT)
    inner.config.tie_word_embeddings = False
    inner.save_pretrained(tmp_path / "inner")
    with pytest.raises(dt.AdapterError, match=r"\(lm_head\)"):
        Writer.load(Sources(str(tmp_path / "inner"), {}))


def test_a_head_may_have_another_name_in_files(sources, tmp_path):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    GPTNeoXForCausalLM(GPTNeoXConfig(**shape, vocab_size=llama().config.vocab_size)).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    keys = load_file(tmp_path / "model.safetensors")
    assert "embed_out.weight" in keys
    assert "lm_head.weight" not in keys
    assert Writer.load(Sources(str(tmp_path), {})).write([Prompt("once")], SHORT)[0].tokens


def test_a_model_with_an_encoder_is_refused_as_in_training(tmp_path):
    from transformers import BartConfig, BartForConditionalGeneration

    names = ("layers", "ffn_dim", "attention_heads")
    sizes = {f"{part}_{name}": 2 for part in ("encoder", "decoder") for name in names}
    BartForConditionalGeneration(BartConfig(vocab_size=257, d_model=8, **sizes)).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(dt.AdapterError, match="a bart has an encoder, which would be left out"):
        Writer.load(Sources(str(tmp_path), {}))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"max_tokens": 0}, "max_tokens must be above 0"),
        ({"temperature": -1.0}, "temperature must be at least 0"),
        ({"temperature": float("nan")}, "temperature must be at least 0"),
        ({"top_p": 0.0, "temperature": 1.0}, "top_p must lie above 0"),
        ({"top_k": 5, "seed": 1}, "top_k, seed: without effect at temperature 0"),
        ({"top_k": -1, "temperature": 1.0}, "top_k must be at least 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0"),
        ({"seed": -1, "temperature": 1.0}, "seed must be at least 0"),
        ({"seed": 2**32, "temperature": 1.0}, "seed must be below 2**32"),
    ],
)
def test_sampling_that_cannot_work(options, complaint):
    assert [complaint in problem for problem in Sampling(**options).problems()] == [True]


@pytest.mark.parametrize(
    "own",
    [
        {"min_p": 0.9, "do_sample": True},
        {"epsilon_cutoff": 0.5, "do_sample": True},
        {"typical_p": 0.01, "do_sample": True},
        {"return_dict_in_generate": True},
        {"num_beams": 2, "num_return_sequences": 2},
    ],
)
def test_what_a_model_says_of_sampling_is_overridden(writer, own):
    sampling = Sampling(max_tokens=12, temperature=1.5)
    expected = writer.write([Prompt("once")], sampling)
    for name, value in own.items():
        setattr(writer.model.generation_config, name, value)
    assert writer.write([Prompt("once")], sampling) == expected


def test_labels():
    assert (label(None), label("tales")) == ("base", "tales")


def test_prompts_are_what_they_were_in_training():
    """A tokenizer that ends every text with a sign would have the model continue a text that is over."""
    made = sentencepiece_tokenizer()
    made.chat_template = "<s>{% for m in messages %} {{ m['content'] }}{% endfor %}"
    writer = Writer(llama(), made)
    assert writer.check([Prompt("once upon"), chat("a")]) == [[1, 3, 4], [1, *made("a")["input_ids"][1:-1]]]


def test_a_long_prompt_in_the_batch_does_not_shorten_what_others_get(writer):
    prompts = [Prompt("x" * 120), Prompt("x"), Prompt("once")]
    together = writer.write(prompts, Sampling(max_tokens=20), "one")
    assert [one.tokens for one in together] == [8, 20, 20]
    assert together == [writer.write([prompt], Sampling(max_tokens=20), "one")[0] for prompt in prompts]


def test_padding_is_not_taken_for_a_repetition():
    model, words = llama(), tokenizer()
    end, other = words.eos_token_id, words("a")["input_ids"][0]
    model.lm_head = torch.nn.Linear(16, 257)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias.zero_()[[end, other]] = torch.tensor([1.0, 0.9])
    found = Writer(model, words).write([Prompt("xyz"), Prompt("x")], Sampling(max_tokens=4, repetition_penalty=1.5))
    assert [one.tokens for one in found] == [0, 0], "the likeliest token is the end, in padded rows too"
