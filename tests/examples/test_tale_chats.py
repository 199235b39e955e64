"""What examples/tale_chats.py promises: whole sentences, three passages a chat, every chat of one tale."""

from tale_chats import WORDS, chats, passages

SENTENCE = "Once there was a hen that laid an egg each day."


def test_passages_are_whole_sentences():
    found = passages(" ".join([SENTENCE] * 13))
    assert [len(part.split()) for part in found] == [66, 66]
    assert all(part.endswith("each day.") for part in found)
    assert WORDS == 60


def test_a_chat_goes_on_where_the_passage_ends():
    told = [f"Day {number} came. {SENTENCE}" for number in range(20)]
    tales = f"The Hen\n\n{SENTENCE}\n\n\nThe Fox\n\n{' '.join(told)}\n"
    (chat,) = chats(tales)
    first, answer, more, further = (turn["content"] for turn in chat)
    assert [turn["role"] for turn in chat] == ["user", "assistant"] * 2
    opening, shown = first.split("\n\n")
    assert opening == "Go on with the tale “The Fox”:"
    assert more == "And then?"
    assert " ".join([shown, answer, further]) == " ".join(told)[: len(f"{shown} {answer} {further}")]
