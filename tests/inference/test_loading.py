from doratune.inference.loading import Loading
from doratune.train.information import Information


def noted(**values):
    return Information("text-generation", "base", "dora", **values)


def test_without_notes_it_is_as_asked_or_by_default():
    assert Loading.choose({}) == Loading("auto", None, True, None)
    assert Loading.choose({}, "bfloat16", "int8") == Loading("bfloat16", "int8", True, None)
    assert Loading.choose({"one": noted()}) == Loading("auto", None, True, None)


def test_what_is_asked_wins_over_what_was_noted():
    trained = {"one": noted(dtype="bfloat16", quantize="nf4", double_quant=False)}
    assert Loading.choose(trained, "float32", None) == Loading("float32", None, False, None)
    assert Loading.choose(trained, "float32", "nf4") == Loading("float32", "nf4", False, None)
    assert Loading.choose(trained, "float32").told == (
        "the base is loaded as in training: --quantize nf4 (--quantize none: in full precision)"
    )


def test_merged_it_is_in_full_precision():
    found = Loading.choose({"one": noted(dtype="bfloat16", quantize="nf4")}, merged=True)
    assert (found.dtype, found.quantize) == ("bfloat16", None)
    assert found.told == (
        "trained with --quantize nf4; merged into the base in full precision, which is not exactly the same model; "
        "the base is loaded as in training: --dtype bfloat16"
    )
