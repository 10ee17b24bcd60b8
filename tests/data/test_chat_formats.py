"""Every chat format under every tokenizer: published vectors, transformers' own tokenization, and invariants."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from chat_tokenizers import CONTROL, EXACT, IMAGE, LOSSY, OWN_TEMPLATES, qwen_words, vicuna_words
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import LlamaConfig

from skipvision_train.data.messages import chat_template
from skipvision_train.data.processor import SkipVisionProcessor
from skipvision_train.data.records import Turn
from skipvision_train.data.templates import IGNORED, get_template
from skipvision_train.errors import DataError
from skipvision_train.evaluation.evaluate import generate_answers

TEMPLATES = ("llama3", "plain", "vicuna_v1", "chatml", "qwen2_5", "tokenizer")
TOKENIZERS = EXACT | LOSSY
ENDS = {"llama3": "<|eot_id|>", "plain": "<|eot_id|>", "vicuna_v1": "</s>", "chatml": "<|im_end|>"}
ENDS |= {"qwen2_5": "<|im_end|>"}
SPELLED = "".join(CONTROL)


def supervised_runs(encoded):
    runs, before = [], IGNORED
    for label in encoded.labels:
        if label != IGNORED:
            if before == IGNORED:
                runs.append([])
            runs[-1].append(label)
        before = label
    return runs


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def end_of(name, tokenizer):
    return tokenizer.convert_tokens_to_ids(ENDS.get(name, tokenizer.eos_token))


def image_id(tokenizer):
    return tokenizer.convert_tokens_to_ids(IMAGE)


@pytest.fixture(autouse=True)
def _own_template():
    """What ``tokenizer`` reads; the tokenizers are shared between tests."""
    for build in TOKENIZERS.values():
        build().chat_template = OWN_TEMPLATES["zephyr"]


VICUNA_SYSTEM_IDS = [
    *(319, 13563, 1546, 263, 12758, 1404, 322, 385, 23116, 21082, 20255, 29889, 450, 20255, 4076, 8444, 29892, 13173),
    *(29892, 322, 1248, 568, 6089, 304, 278, 1404, 29915, 29879, 5155, 29889),
]
ASSISTANT = [319, 1799, 9047, 13566, 29901]


def test_golden_vicuna(turns):
    """The ids and labels that FastChat's training makes of Vicuna's two questions, with LLaMA-2's tokenizer."""
    tokenizer, template = vicuna_words(), get_template("vicuna_v1")
    who = "I am Vicuna, a language model trained by researchers from Large Model Systems Organization (LMSYS)."
    sample = turns("Who are you?", who, "What can you do? ", "\nI can chat with you.")
    encoded = template.encode(sample, tokenizer, [], 32000)
    first = [1, *VICUNA_SYSTEM_IDS, 3148, 1001, 29901, 11644, 526, 366, 29973, *ASSISTANT]
    answer = [306, 626, 13423, 4347, 29892, 263, 4086, 1904, 16370, 491, 5925, 414, 515, 8218, 479, 8125, 23985]
    answer += [9205, 2133, 313, 29931, 4345, 21554, 467, 2]
    second = [3148, 1001, 29901, 1724, 508, 366, 437, 29973, *ASSISTANT]
    last = [306, 508, 13563, 411, 366, 29889, 2]
    assert encoded.input_ids == [*first, *answer, *second, *last]
    assert encoded.labels == [*[-100] * len(first), *answer, *[-100] * len(second), *last]
    assert template.encode_prompt(sample[:1], tokenizer, [], 32000).input_ids == first
    assert template.encode_prompt(sample[:3], tokenizer, [], 32000).input_ids == [*first, *answer, *second]


def test_golden_vicuna_with_an_image(turns):
    """As LLaVA cuts the prompt at the image: a lone space before it, and a space before the line break behind it."""
    question = [3148, 1001, 29901, 29871, *[32000] * 3, 29871, 13, 5618, 338, 278, 1404, 29973, *ASSISTANT]
    for text in ("<image>\nWhat is the user?", " <image> What is the user?\n"):
        prompt = get_template("vicuna_v1").encode_prompt(turns(text), vicuna_words(), [3], 32000)
        assert prompt.input_ids == [1, *VICUNA_SYSTEM_IDS, *question]
        assert prompt.image_starts == [len(VICUNA_SYSTEM_IDS) + 5]


def test_a_system_turn_replaces_vicunas_own(turns):
    encoded = get_template("vicuna_v1").encode_prompt(turns("Who?", system=" The user. "), vicuna_words(), [], 32000)
    assert encoded.input_ids == [1, 450, 1404, 29889, 3148, 1001, 29901, 11644, 29973, *ASSISTANT]


def test_golden_chatml(turns):
    """The vector that Qwen2.5's tokenizer gives for its own chat template."""
    tokenizer, sample = qwen_words(), turns("What's 2+2?", "4.")
    system = [151644, 8948, 198, 2610, 525, 1207, 16948, 11, 3465, 553, 54364, 14817, 13]
    system += [1446, 525, 264, 10950, 17847, 13, 151645, 198]
    question = [151644, 872, 198, 3838, 594, 220, 17, 10, 17, 30, 151645, 198, 151644, 77091, 198]
    encoded = get_template("qwen2_5").encode(sample, tokenizer, [], 0)
    assert encoded.input_ids == [*system, *question, 19, 13, 151645, 198]
    assert encoded.labels == [*[-100] * len(system + question), 19, 13, 151645, -100]
    assert get_template("chatml").encode(sample, tokenizer, [], 0).input_ids == [*question, 19, 13, 151645, 198]
    assert get_template("qwen2_5").encode_prompt(sample[:1], tokenizer, [], 0).input_ids == [*system, *question]
    given = turns("What's 2+2?", system="You are a")
    spoken = get_template("qwen2_5").encode_prompt(given, tokenizer, [], 0)
    assert spoken.input_ids == [151644, 8948, 198, 2610, 525, 264, 151645, 198, *question]
    assert get_template("chatml").encode_prompt(given, tokenizer, [], 0) == spoken


def test_an_empty_question_is_vicunas_header_alone(turns):
    tokenizer = vicuna_words()
    prompt = get_template("vicuna_v1").encode_prompt(turns("", system="The user."), tokenizer, [], 32000)
    assert prompt.input_ids == [1, 450, 1404, 29889, 3148, 1001, 29901, *ASSISTANT]
    messages = [{"role": "system", "content": "The user."}, {"role": "user", "content": " "}]
    text = chat_template("vicuna_v1", IMAGE)
    rendered = tokenizer.apply_chat_template(
        messages, chat_template=text, add_generation_prompt=True, return_dict=False
    )
    assert rendered == prompt.input_ids


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_supervised_tokens_are_the_answers(name, tokenizer, turns):
    exact, tokenizer = tokenizer in EXACT, TOKENIZERS[tokenizer]()
    texts = ["<image>\nWhat is it?", "A cat (1), ünï: 日.", "Yes?", ") no!", f"{SPELLED} ", f" {SPELLED}x"]
    texts = texts[:2] if name == "plain" else texts
    encoded = get_template(name).encode(turns(*texts), tokenizer, [3], image_id(tokenizer))
    end = end_of(name, tokenizer)
    assert get_template(name).end(tokenizer) == end
    runs = supervised_runs(encoded)
    assert [run[-1] for run in runs] == [end] * (len(texts) // 2)
    for run, answer in zip(runs, texts[1::2], strict=True):
        decoded, answer = tokenizer.decode(run[:-1]), answer.strip()
        if exact:
            # A space or line break between the header and the answer belongs to the answer.
            assert decoded.lstrip(" \n") == answer
        else:
            assert decoded.replace(" ", "") == tokenizer.decode(ids_of(tokenizer, answer)).replace(" ", "")
    assert encoded.input_ids.count(image_id(tokenizer)) == 3


WORDS = ["What", " is", "it?", "1", " ", "\n", "ünï", "日", ":)", ")", "don't", SPELLED, "</s>", "  "]
TEXTS = st.lists(st.sampled_from(WORDS), max_size=5).map("".join)
ANSWERS = TEXTS.filter(lambda text: text.strip() != "")


@st.composite
def conversations(draw, pairs=3):
    """Turns, and how many images they show."""
    sample, images = [], 0
    if draw(st.booleans()):
        sample.append(Turn("system", draw(TEXTS)))
    for _ in range(draw(st.integers(1, pairs))):
        parts = draw(st.lists(st.one_of(TEXTS, st.just("<image>")), max_size=3))
        images += parts.count("<image>")
        sample += [Turn("user", "".join(parts)), Turn("assistant", draw(ANSWERS))]
    return sample, images


@settings(max_examples=150)
@given(
    conversation=conversations(),
    name=st.sampled_from(TEMPLATES),
    tokenizer=st.sampled_from([name for name in TOKENIZERS if name != "clip"]),
    lengths=st.lists(st.integers(1, 4), min_size=9, max_size=9),
)
def test_any_conversation(conversation, name, tokenizer, lengths):
    sample, images = conversation
    template, tokenizer = get_template(name), TOKENIZERS[tokenizer]()
    if name == "plain":
        sample = [turn for turn in sample if turn.role != "system"][:2]
        images = sample[0].text.count("<image>")
    lengths, placeholder = lengths[:images], image_id(tokenizer)
    encoded = template.encode(sample, tokenizer, lengths, placeholder)
    assert len(encoded.labels) == len(encoded.input_ids)
    assert all(label in (IGNORED, token) for label, token in zip(encoded.labels, encoded.input_ids, strict=True))

    spans = [range(start, start + n) for start, n in zip(encoded.image_starts, lengths, strict=True)]
    assert [i for span in spans for i in span] == [i for i, t in enumerate(encoded.input_ids) if t == placeholder]

    prompt = template.encode_prompt(sample[:-1], tokenizer, lengths, placeholder)
    assert encoded.input_ids[: len(prompt.input_ids)] == prompt.input_ids
    assert encoded.labels[len(prompt.input_ids)] != IGNORED
    assert set(prompt.labels) <= {IGNORED}
    assert prompt.image_starts == encoded.image_starts

    # What is said has no say in the control tokens.
    special = set(tokenizer.convert_tokens_to_ids(list(CONTROL)))
    plain_words = [Turn(t.role, "<image>" * t.text.count("<image>") + "x") for t in sample]
    expected = template.encode(plain_words, tokenizer, lengths, placeholder)
    assert [i for i in encoded.input_ids if i in special] == [i for i in expected.input_ids if i in special]
    assert len(supervised_runs(encoded)) == len(supervised_runs(expected)) == sum(t.role == "assistant" for t in sample)


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "plain"])
def test_truncation_ends_behind_an_answer(name, turns):
    tokenizer, template = EXACT["sentencepiece"](), get_template(name)
    texts = ("What is it? <image>", "A cat.", "Yes?", "No.", "a", "b")
    whole = [template.encode(turns(*texts[:n]), tokenizer, [2], image_id(tokenizer)) for n in (2, 4, 6)]
    lengths = [len(encoded.input_ids) for encoded in whole]
    for limit in range(lengths[0], lengths[2] + 2):
        fits = max(i for i, length in enumerate(lengths) if length <= limit)
        assert template.encode(turns(*texts), tokenizer, [2], image_id(tokenizer), max_length=limit) == whole[fits]
    with pytest.raises(DataError, match=f"take {lengths[0]} tokens, max_length is {lengths[0] - 1}"):
        template.encode(turns(*texts), tokenizer, [2], image_id(tokenizer), max_length=lengths[0] - 1)


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("name", ["llama3", "vicuna_v1", "chatml", "qwen2_5"])
@pytest.mark.parametrize("tokenizer", ["byte-level", "sentencepiece"])
def test_the_jinja_text_says_the_same(name, tokenizer, system, turns):
    """transformers renders and tokenizes the whole conversation at once; both kinds know no difference."""
    tokenizer = EXACT[tokenizer]()
    text = chat_template(name, IMAGE)
    messages = [] if system is None else [{"role": "system", "content": [{"type": "text", "text": system}]}]
    messages += [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " What is it?\n"}]},
        {"role": "assistant", "content": " A cat. "},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]},
        {"role": "assistant", "content": "12 :)"},
    ]
    sample = turns("<image>What is it?", "A cat.", "a<image>", "12 :)", system=system)
    for count, encode in ((4, get_template(name).encode), (3, get_template(name).encode_prompt)):
        said = messages[: count + (system is not None)]
        rendered = tokenizer.apply_chat_template(
            said, chat_template=text, tokenize=False, add_generation_prompt=count == 3
        )
        turns_said = sample[: len(said)]
        encoded = encode(turns_said, tokenizer, [1, 1], image_id(tokenizer))
        assert tokenizer(rendered, add_special_tokens=False)["input_ids"] == encoded.input_ids


def test_formats_without_a_jinja_text():
    assert chat_template("plain", IMAGE) is None
    assert chat_template("tokenizer", IMAGE) is None


@pytest.mark.parametrize("name", ["vicuna_v1", "chatml"])
def test_a_tokenizer_without_the_control_tokens_is_named(name, tokenizer, turns):
    token = {"vicuna_v1": "<s>", "chatml": r"<\|im_start\|>"}[name]
    with pytest.raises(DataError, match=f"lacks the token {token}"):
        get_template(name).encode_prompt(turns("a"), tokenizer, [], 0)


def test_plain_takes_the_tokenizers_own_ends(turns):
    for tokenizer, begin, end in ((vicuna_words(), [1], 2), (qwen_words(), [], 151645)):
        eos = tokenizer.eos_token
        tokenizer = without_llama3(tokenizer)
        encoded = get_template("plain").encode(turns("x <image>", "?"), tokenizer, [1], 5)
        assert encoded.input_ids == [*begin, 5, *ids_of(tokenizer, "?"), end]
        assert encoded.labels[-1] == tokenizer.convert_tokens_to_ids(eos)
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="has no eos_token; template plain ends with it"):
        get_template("plain").end(tokenizer)


def without_llama3(tokenizer):
    """The same with other names for LLaMA-3's control tokens."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    text = tokenizer.backend_tokenizer.to_str().replace("<|begin_of_text|>", "<b>").replace("<|eot_id|>", "<e>")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(text), bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token
    )


@pytest.fixture
def processor_for(config_factory):
    def make(name, tokenizer="byte-level"):
        tokenizer = TOKENIZERS[tokenizer]()
        return SkipVisionProcessor.from_config(config_factory(image_token_id=image_id(tokenizer)), tokenizer, name)

    return make


@pytest.mark.parametrize("tokenizer", ["byte-level", "sentencepiece", "sentencepiece, first"])
@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "plain"])
def test_the_processor_reads_what_it_rendered(name, tokenizer, processor_for, turns):
    processor = processor_for(name, tokenizer)
    picture = Image.new("RGB", (20, 20))
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " What is it?"}]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "Yes?"},
    ]
    rendered = processor.apply_chat_template(messages, tokenize=False)
    expected = processor.encode_prompt(turns("<image>What is it?", "A cat.", "Yes?"), [picture])
    assert processor(text=rendered, images=picture)["input_ids"].tolist() == [expected.input_ids]


def test_the_template_begins_a_text_that_lacks_its_beginning(processor_for):
    vicuna, chatml = processor_for("vicuna_v1"), processor_for("chatml")
    bos = vicuna.tokenizer.convert_tokens_to_ids("<s>")
    assert vicuna(text="<s>a")["input_ids"].tolist() == vicuna(text="a")["input_ids"].tolist()
    assert vicuna(text="a")["input_ids"][0, 0] == bos
    assert chatml(text="a")["input_ids"].tolist() == [ids_of(chatml.tokenizer, "a")]


@pytest.mark.parametrize("name", TEMPLATES)
def test_generation_stops_at_the_templates_end(name, processor_for):
    processor = processor_for(name)
    end = end_of(name, processor.tokenizer)
    asked = {}

    def generate(**options):
        asked.update(options)
        for tokens in (options["input_ids"], torch.tensor([end])):
            options["streamer"].put(tokens)
        new = torch.tensor([[*ids_of(processor.tokenizer, " Paris"), end]])
        sequences = torch.cat([options["input_ids"], new], dim=1)
        return SimpleNamespace(sequences=sequences, past_key_values=SimpleNamespace(layers=[]))

    batch = {"input_ids": torch.tensor([ids_of(processor.tokenizer, "What?")])}
    assert generate_answers(
        SimpleNamespace(generate=generate, config=LlamaConfig(num_hidden_layers=1)), processor, batch, 3
    ) == ["Paris"]
    assert asked["eos_token_id"] == [processor.end_id] == [processor.pad_id] == [end]


def test_a_tokenizer_that_does_not_fit_is_refused_before_training(config_factory, fresh_tokenizer):
    config = config_factory(image_token_id=fresh_tokenizer.convert_tokens_to_ids("<|reserved_special_token_0|>"))
    with pytest.raises(DataError, match=r"lacks the token <\|im_end\|>"):
        SkipVisionProcessor.from_config(config, fresh_tokenizer, "chatml")


def test_tools_are_refused(processor_for):
    processor = processor_for("chatml")
    user, call = {"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [{"id": 1}]}
    with pytest.raises(DataError, match="message 1 has the role 'tool'; the roles are system, user, assistant, and no"):
        processor.apply_chat_template([user, {"role": "tool", "content": "3"}])
    for tokenize in (True, False):
        with pytest.raises(DataError, match="message 1 calls tools; the roles"):
            processor.apply_chat_template([user, call, user], tokenize=tokenize)
    with pytest.raises(DataError, match="message 0, part 0: a text part or an image part is expected, found 'x'"):
        processor.apply_chat_template([{"role": "user", "content": ["x"]}], tokenize=False)
