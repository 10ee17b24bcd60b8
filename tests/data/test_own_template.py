"""The tokenizer's own chat template: against transformers' rendering and tokenizing, and what is refused."""

from __future__ import annotations

import copy

import pytest
from chat_tokenizers import EXACT, IMAGE, OWN_TEMPLATES
from hypothesis import given, settings
from hypothesis import strategies as st

from skipvision_train.data.messages import chat_template
from skipvision_train.data.records import Turn
from skipvision_train.data.templates import IGNORED, get_template
from skipvision_train.errors import DataError

OWN = get_template("tokenizer")
ENDS = {"zephyr": "</s>", "llama2": "</s>", "gemma": "<|im_end|>", "llama3.2": "<|eot_id|>"}
TEXTS = ("What is it?", "A cat.", "Yes (1)?", "12 :)", "Why", "日")
BODY = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"


def with_template(text, kind="byte-level", eos="</s>"):
    tokenizer = copy.deepcopy(EXACT[kind]())
    tokenizer.chat_template, tokenizer.eos_token = text, eos
    return tokenizer


def messages_of(turns):
    return [{"role": turn.role, "content": turn.text.strip()} for turn in turns]


def supervised_texts(encoded, tokenizer):
    runs, before = [], IGNORED
    for label in encoded.labels:
        if label != IGNORED:
            if before == IGNORED:
                runs.append([])
            runs[-1].append(label)
        before = label
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
@pytest.mark.parametrize(
    ("name", "system"),
    [(name, None) for name in OWN_TEMPLATES] + [(name, "Be brief.") for name in ("zephyr", "llama2", "llama3.2")],
)
def test_the_ids_are_those_of_transformers(name, system, kind, turns):
    tokenizer = with_template(OWN_TEMPLATES[name], kind)
    sample = turns(*TEXTS, system=system)
    options = {"tokenize": True, "return_dict": False, "date_string": "26 Jul 2024"}
    encoded = OWN.encode(sample, tokenizer, [], 0)
    assert encoded.input_ids == tokenizer.apply_chat_template(messages_of(sample), **options)
    prompt = OWN.encode_prompt(sample[:-1], tokenizer, [], 0)
    options["add_generation_prompt"] = True
    assert prompt.input_ids == tokenizer.apply_chat_template(messages_of(sample[:-1]), **options)

    bos = {"llama2": "<s>", "gemma": "<s>", "llama3.2": "<|begin_of_text|>"}.get(name)
    if bos is not None:
        assert tokenizer.decode(encoded.input_ids[0]) == bos
        assert encoded.input_ids.count(tokenizer.convert_tokens_to_ids("<|begin_of_text|>")) <= 1
    # LLaMA-2's writes a space around an answer, and both are the model's to write.
    expected = [f" {text} " if name == "llama2" else text for text in TEXTS[1::2]]
    found = supervised_texts(encoded, tokenizer)
    if kind == "sentencepiece":  # the decoder takes the first space for the one that the tokenizer adds
        expected = [text.removeprefix(" ") for text in expected]
    assert found == [text + ENDS[name] for text in expected]
    assert OWN.end(tokenizer) == tokenizer.convert_tokens_to_ids(ENDS[name])


@pytest.mark.parametrize("ours", ["llama3", "vicuna_v1", "chatml", "qwen2_5"])
def test_our_jinja_texts_give_our_formats(ours, turns):
    tokenizer = with_template(chat_template(ours, IMAGE), "sentencepiece")
    image = tokenizer.convert_tokens_to_ids(IMAGE)
    sample = turns("a <image> b <image>", "c", "d", "e")
    whole = OWN.encode(sample, tokenizer, [2, 1], image)
    assert whole == get_template(ours).encode(sample, tokenizer, [2, 1], image)
    limit = len(whole.input_ids) - 1
    cut = OWN.encode(sample, tokenizer, [2, 1], image, limit)
    assert cut == get_template(ours).encode(sample[:2], tokenizer, [2, 1], image)


def test_the_beginning_is_what_the_template_writes():
    for name, begin in (("zephyr", None), ("llama2", "<s>"), ("gemma", "<s>")):
        tokenizer = with_template(OWN_TEMPLATES[name], "sentencepiece")
        assert OWN.begin(tokenizer) == (begin and tokenizer.convert_tokens_to_ids(begin))


def test_a_dated_header_stands_once_and_with_one_date(turns):
    tokenizer = with_template(OWN_TEMPLATES["llama3.2"])
    text = tokenizer.decode(OWN.encode(turns(*TEXTS), tokenizer, [], 0).input_ids)
    assert text.count("Today Date") == text.count("Today Date: 26 Jul 2024") == 1


def test_a_template_set_later_is_used(turns):
    tokenizer = with_template(OWN_TEMPLATES["zephyr"])
    before = OWN.encode(turns("a", "b"), tokenizer, [], 0)
    tokenizer.chat_template = BODY + PROMPT
    after = OWN.encode(turns("a", "b"), tokenizer, [], 0)
    assert before != after == get_template("chatml").encode(turns("a", "b"), tokenizer, [], 0)


@settings(max_examples=50)
@given(
    name=st.sampled_from(["zephyr", "llama2", "llama3.2"]),
    kind=st.sampled_from(list(EXACT)),
    texts=st.lists(st.text(max_size=8).filter(lambda t: t.strip() and "<image>" not in t), min_size=2, max_size=6),
)
def test_any_text(name, kind, texts):
    tokenizer = with_template(OWN_TEMPLATES[name], kind)
    texts = texts[: len(texts) // 2 * 2]
    sample = [Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]
    encoded = OWN.encode(sample, tokenizer, [], 0)
    prompt = OWN.encode_prompt(sample[:-1], tokenizer, [], 0)
    assert encoded.input_ids[: len(prompt.input_ids)] == prompt.input_ids
    ends = [i for i in encoded.labels if i == OWN.end(tokenizer)]
    assert len(ends) == len(texts) // 2
    if kind == "byte-level":
        assert [t.removesuffix(ENDS[name]).strip() for t in supervised_texts(encoded, tokenizer)] == [
            text.strip() for text in texts[1::2]
        ]


REFUSED = {
    "earlier turns change": (
        "{% for m in messages %}{{ '<|im_start|>' + ('last' if loop.last else '') + m['content'] + '<|im_end|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}",
        "writes the turns before turn 2 differently once that turn follows",
    ),
    "thoughts before the last answer (Qwen3)": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if loop.last and m['role'] == 'assistant' %}"
        "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{{ m['content'] + '<|im_end|>\\n' }}{% endfor %}" + PROMPT,
        "writes '\\n?<think>.*' between the prompt and the answer",
    ),
    "no end": (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
        "writes no special token behind an answer",
    ),
    "different ends": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] }}"
        "{{ '</s>' if loop.index == 3 else '<|im_end|>' }}{% endfor %}" + PROMPT,
        "ends answers in different ways: </s>, <\\|im_end\\|>",
    ),
    "drops a turn": (
        "{% for m in messages if m['role'] != 'system' %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content']"
        " + '<|im_end|>\\n' }}{% endfor %}" + PROMPT,
        "does not write the text of turn 1 once, behind what was said before",
    ),
    "knows no text": (
        "{% for m in messages %}{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{{ '</s>' }}{% endfor %}",
        "does not write the text of turn 1 once",
    ),
    "date of the day": (BODY + "{{ strftime_now('%d') }}", "writes the date of the day"),
    "raises": ("{{ raise_exception('no system here') }}", "cannot write the turns system, user: no system here"),
    "broken": ("{% for %}", "cannot write the turns system, user: "),
    "none": (None, "has no chat template; name another template"),
}


@pytest.mark.parametrize(("text", "error"), REFUSED.values(), ids=REFUSED)
def test_templates_that_are_refused(text, error, turns):
    tokenizer = with_template(text)
    tokenizer.init_kwargs["name_or_path"] = tokenizer.name_or_path = "some/model"
    with pytest.raises(DataError, match=error) as caught:
        OWN.encode(turns("a", "b", "c", "d", system="s"), tokenizer, [], 0)
    assert "some/model" in str(caught.value)
    assert "\n" not in str(caught.value).replace("\\n", "")


def test_a_text_that_the_template_changes_is_refused(turns):
    tokenizer = with_template(BODY.replace("m['content']", "m['content'].split('</think>')[-1]") + PROMPT)
    assert OWN.encode(turns("a", "b"), tokenizer, [], 0) == get_template("chatml").encode(
        turns("a", "b"), tokenizer, [], 0
    )
    with pytest.raises(DataError, match="does not write the turns' texts as they are"):
        OWN.encode(turns("a", "<think>x</think>b"), tokenizer, [], 0)


def test_tokens_that_swallow_the_space_beside_them_and_begin_like_another(turns):
    from tokenizers import AddedToken

    tokenizer = copy.deepcopy(EXACT["sentencepiece"]())
    swallowing = {"<|a": {}, "<|a|>": {"rstrip": True}, "<|a|>b": {"lstrip": True}}
    tokenizer.add_tokens([AddedToken(token, normalized=False, **sides) for token, sides in swallowing.items()])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|a|> \\n' + m['content'] + ' \\n<|a|>b' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|a|> \\n' }}{% endif %}"
    )
    sample = turns("x", "y")
    expected = tokenizer.apply_chat_template(messages_of(sample), return_dict=False)
    assert OWN.encode(sample, tokenizer, [], 0).input_ids == expected
