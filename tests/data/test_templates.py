"""Chat formats against golden vectors, against the Jinja rendering, and by decoding what is supervised."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from skipvision_train.data.records import Turn
from skipvision_train.data.templates import IGNORED, get_template
from skipvision_train.errors import DataError

LLAMA3, PLAIN = get_template("llama3"), get_template("plain")


def supervised_texts(encoded, tokenizer):
    """The supervised stretches, decoded one by one."""
    runs, before = [], IGNORED
    for label in encoded.labels:
        if label != IGNORED:
            if before == IGNORED:
                runs.append([])
            runs[-1].append(label)
        before = label
    return [tokenizer.decode(run) for run in runs]


def test_golden_vector(golden_tokenizer, turns):
    encoded = LLAMA3.encode(turns(" What is the capital of France?\n", "Paris "), golden_tokenizer, [], 128002)
    assert encoded.input_ids == [
        *(128000, 128006, 882, 128007, 271, 3923, 374, 279, 6864, 315, 9822, 30, 128009),
        *(128006, 78191, 128007, 271, 60704, 128009),
    ]
    assert encoded.labels == [-100] * 17 + [60704, 128009]
    prompt = LLAMA3.encode_prompt(turns("What is the capital of France?"), golden_tokenizer, [], 128002)
    assert prompt.input_ids == encoded.input_ids[:17]


def test_golden_vector_with_system_turn_and_image(golden_tokenizer, turns):
    sample = turns("<image>\n\nWhat", "Paris", system=" What ")
    encoded = LLAMA3.encode(sample, golden_tokenizer, [3], 128002)
    newline = golden_tokenizer.convert_tokens_to_ids("<unk>")  # the word list has no single newline
    assert encoded.input_ids == [
        *(128000, 128006, 9125, 128007, 271, 3923, 128009),
        *(128006, 882, 128007, 271, 128002, 128002, 128002, newline, 3923, 128009),
        *(128006, 78191, 128007, 271, 60704, 128009),
    ]
    assert encoded.image_starts == [11]


def test_golden_plain(golden_tokenizer, turns):
    encoded = PLAIN.encode(turns("What is this?\n<image>", " Paris\n"), golden_tokenizer, [2], 128002)
    assert encoded.input_ids == [128000, 128002, 128002, 60704, 128009]
    assert encoded.labels == [-100, -100, -100, 60704, 128009]
    assert encoded.image_starts == [1]
    prompt = PLAIN.encode_prompt(turns("What?\n<image>"), golden_tokenizer, [2], 128002)
    assert prompt.input_ids == [128000, 128002, 128002]


CONVERSATIONS = {
    "one turn": (("<image>\nWhat?", "A cat."), None, 1),
    "several turns": (("<image>\nWhat?", "A cat.", "Where?", "On a mat!", "Why?", "It is warm."), None, 1),
    "system": (("What?", "This."), "Be brief.", 0),
    "several images": (("<image>\n<image> Compare", "Same.", "now <image> too", "Other."), None, 3),
    "text only": (("Hi", "Hello, ünïcode 日本 !!"), None, 0),
}


@pytest.mark.parametrize(("texts", "system", "images"), CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_decoding_the_supervised_tokens_gives_exactly_the_answers(turns, tokenizer, image_id, texts, system, images):
    encoded = LLAMA3.encode(turns(*texts, system=system), tokenizer, [4] * images, image_id)
    assert supervised_texts(encoded, tokenizer) == [answer + "<|eot_id|>" for answer in texts[1::2]]
    assert all(label in (IGNORED, token) for label, token in zip(encoded.labels, encoded.input_ids, strict=True))
    assert encoded.input_ids.count(image_id) == 4 * images


def test_decoding_the_supervised_tokens_of_plain(turns, tokenizer, image_id):
    encoded = PLAIN.encode(turns("Describe it.\n<image>", " A cat on a mat. "), tokenizer, [4], image_id)
    assert supervised_texts(encoded, tokenizer) == ["A cat on a mat.<|eot_id|>"]
    assert "Describe" not in tokenizer.decode(encoded.input_ids)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<image>\nWhat?", "I\nWhat?"),
        ("What?\n<image>", "What?\nI"),
        ("  a <image> b<image>", "a\nI\nb\nI"),
        ("<image><image>", "I\nI"),
        ("<image>", "I"),
        ("a\n\nb", "a\n\nb"),
        ("", ""),
    ],
)
def test_images_stand_at_their_markers(turns, tokenizer, image_id, text, expected):
    encoded = LLAMA3.encode_prompt(turns(text), tokenizer, [1] * text.count("<image>"), image_id)
    rendered = tokenizer.decode(encoded.input_ids).replace("<|reserved_special_token_0|>", "I")
    assert rendered == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n" + expected + "<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_special_tokens_in_text_stay_text(turns, tokenizer, image_id):
    spelled = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n<|reserved_special_token_0|><|begin_of_text|>"
    encoded = LLAMA3.encode(turns(spelled, spelled, system=spelled), tokenizer, [], image_id)
    control = [token for token in encoded.input_ids if token in tokenizer.all_special_ids or token == image_id]
    bos, eot = (tokenizer.convert_tokens_to_ids(t) for t in ("<|begin_of_text|>", "<|eot_id|>"))
    assert control.count(bos) == 1
    assert control.count(eot) == 3
    assert image_id not in control
    assert supervised_texts(encoded, tokenizer) == [spelled + "<|eot_id|>"]
    # and the tokenizer still reads special tokens for everybody else
    assert tokenizer("<|eot_id|>", add_special_tokens=False)["input_ids"] == [eot]


def test_earlier_answers_of_a_prompt_are_context(turns, tokenizer, image_id):
    sample = turns("a <image>", "b", "c", "d")
    encoded = LLAMA3.encode(sample, tokenizer, [2], image_id)
    prompt = LLAMA3.encode_prompt(sample[:-1], tokenizer, [2], image_id)
    assert encoded.input_ids[: len(prompt.input_ids)] == prompt.input_ids
    assert tokenizer.decode(encoded.input_ids[len(prompt.input_ids) :]) == "d<|eot_id|>"
    assert set(prompt.labels) == {IGNORED}


def test_truncation_keeps_whole_leading_pairs(turns, tokenizer, image_id):
    texts = ("<image> a", "b", "c", "d", "e", "f")
    whole = [LLAMA3.encode(turns(*texts[:n]), tokenizer, [5], image_id) for n in (2, 4, 6)]
    lengths = [len(e.input_ids) for e in whole]
    for limit in range(lengths[0], lengths[2] + 2):
        fits = max(i for i, length in enumerate(lengths) if length <= limit)
        assert LLAMA3.encode(turns(*texts), tokenizer, [5], image_id, max_length=limit) == whole[fits]
    with pytest.raises(DataError, match=f"take {lengths[0]} tokens, max_length is {lengths[0] - 1}"):
        LLAMA3.encode(turns(*texts), tokenizer, [5], image_id, max_length=lengths[0] - 1)


def test_a_long_pair_ends_the_sample_even_if_a_later_one_would_fit(turns, tokenizer, image_id):
    texts = ("a", "b", "c" * 400, "d", "e", "f")
    first = LLAMA3.encode(turns("a", "b"), tokenizer, [], image_id)
    assert LLAMA3.encode(turns(*texts), tokenizer, [], image_id, max_length=60) == first


def test_truncation_never_cuts_an_image(turns, tokenizer, image_id):
    sample = turns("<image> a", "b", "<image> c", "d")
    limit = len(LLAMA3.encode(sample, tokenizer, [5, 5], image_id).input_ids) - 1
    with pytest.raises(DataError, match="question and answer 1 hold an image and do not fit"):
        LLAMA3.encode(sample, tokenizer, [5, 5], image_id, max_length=limit)
    with pytest.raises(DataError, match="max_length is 4"):
        PLAIN.encode(turns("<image>", "b"), tokenizer, [5], image_id, max_length=4)


def test_markers_and_images_must_agree(turns, tokenizer, image_id):
    for template in (LLAMA3, PLAIN):
        with pytest.raises(DataError, match="1 <image> markers in the turns, but 2 images"):
            template.encode(turns("<image>", "b"), tokenizer, [5, 5], image_id)
        with pytest.raises(DataError, match="1 <image> markers in the turns, but 0 images"):
            template.encode_prompt(turns("<image>"), tokenizer, [], image_id)


def test_turns_that_a_template_cannot_express(turns, tokenizer, image_id):
    with pytest.raises(DataError, match="ending with assistant"):
        LLAMA3.encode(turns("a"), tokenizer, [], image_id)
    with pytest.raises(DataError, match="ending with user"):
        LLAMA3.encode_prompt(turns("a", "b"), tokenizer, [], image_id)
    with pytest.raises(DataError, match="turns are none"):
        LLAMA3.encode_prompt([], tokenizer, [], image_id)
    with pytest.raises(DataError, match="turns are tool"):
        LLAMA3.encode_prompt([Turn("tool", "x")], tokenizer, [], image_id)
    with pytest.raises(DataError, match=r"template plain: .* found 4 turns"):
        PLAIN.encode(turns("a", "b", "c", "d"), tokenizer, [], image_id)
    with pytest.raises(DataError, match="template plain: a prompt is one user's turn, found 2 turns"):
        PLAIN.encode_prompt(turns("a", system="s"), tokenizer, [], image_id)


def test_unknown_template_lists_the_known_ones():
    with pytest.raises(DataError, match="template 'vicuna' is unknown; use one of llama3, plain, vicuna_v1, chat"):
        get_template("vicuna")


def test_a_tokenizer_without_the_control_tokens_is_named(turns):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    for options in ({}, {"unk_token": "<unk>"}):
        words = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
        other = PreTrainedTokenizerFast(tokenizer_object=words, name_or_path="some/model", **options)
        with pytest.raises(DataError, match=r"tokenizer 'some/model' lacks the token <\|begin_of_text\|>"):
            LLAMA3.encode_prompt(turns("a"), other, [], 0)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    questions=st.lists(st.text(max_size=12).filter(lambda t: "<image>" not in t), min_size=1, max_size=3),
    answer=st.text(min_size=1, max_size=12).filter(lambda t: t.strip() and "<image>" not in t),
    lengths=st.lists(st.integers(1, 5), max_size=3),
)
def test_any_conversation(tokenizer, questions, answer, lengths):
    image_id = tokenizer.convert_tokens_to_ids("<|reserved_special_token_0|>")
    texts = [f"{'<image>' * len(lengths)}{questions[0]}", *questions[1:]]
    sample = [t for text in texts for t in (Turn("user", text), Turn("assistant", answer))]
    encoded = LLAMA3.encode(sample, tokenizer, lengths, image_id)
    assert supervised_texts(encoded, tokenizer) == [answer.strip() + "<|eot_id|>"] * len(questions)
    spans = [range(s, s + n) for s, n in zip(encoded.image_starts, lengths, strict=True)]
    assert [i for span in spans for i in span] == [i for i, t in enumerate(encoded.input_ids) if t == image_id]
