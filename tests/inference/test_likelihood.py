"""Log-likelihoods of given answers, against full forwards and against single steps."""

import json
from itertools import chain

import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from skipvision_train.data.records import Turn
from skipvision_train.errors import DataError
from skipvision_train.inference import Assistant, Conversation, Sampling
from skipvision_train.inference.likelihood import answer_ids, chat_answer_ids, continuation_likelihoods
from skipvision_train.plans import TokenKind, compose, dense, fastv, skip_ffn, skip_kv, vskip

ANSWERS = {"ours": ("B", "red or blue", "no"), "foreign": ("w2", "w1 w5 w3", "w7 w7")}


def asked(questions, pictures):
    return [
        Conversation().ask(questions[0], pictures[:1]),
        Conversation().ask(questions[1], pictures[1:]),
        Conversation().ask(questions[2]),
    ]


def grow(inputs, token):
    """The prompt and one more token of text."""
    more = torch.tensor([[token]])
    values = (("input_ids", token), ("attention_mask", 1), ("token_kinds", TokenKind.TEXT), ("mm_token_type_ids", 0))
    grown = {name: torch.cat([inputs[name], torch.full_like(more, int(v))], 1) for name, v in values if name in inputs}
    return {**inputs, **grown}


@torch.no_grad()
def by_full_forwards(assistant, conversation, ids):
    """One forward without a cache over prompt and answer, for plans that take nothing away after the prompt."""
    inputs = assistant.encode([conversation])
    length = inputs["input_ids"].shape[1]
    for token in ids:
        inputs = grow(inputs, token)
    logits = assistant.model(**inputs, use_cache=False).logits[0, length - 1 : -1].double()
    return sum(float(row.log_softmax(-1)[i]) for row, i in zip(logits, ids, strict=True)), [
        int(row.argmax()) for row in logits
    ] == ids


@torch.no_grad()
def by_steps(assistant, conversation, ids):
    """A prefill with a cache, then token after token, for one conversation: nothing is padded."""
    inputs = assistant.encode([conversation])
    output, total, mask = assistant.model(**inputs, use_cache=True), 0.0, inputs["attention_mask"]
    for token in ids:
        total += float(output.logits[0, -1].double().log_softmax(-1)[token])
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        output = assistant.model(
            torch.tensor([[token]]), attention_mask=mask, past_key_values=output.past_key_values, use_cache=True
        )
    return total


@pytest.mark.parametrize("plan", [dense(), vskip([0, 1])], ids=["dense", "vskip"])
def test_they_are_those_of_full_forwards(assistant, questions, pictures, plan):
    texts = ANSWERS["ours" if assistant.is_ours else "foreign"]
    with assistant.under(plan):
        found = assistant.log_likelihoods(asked(questions, pictures), [texts] * 3)
        for conversation, row in zip(asked(questions, pictures), found, strict=True):
            for text, likelihood in zip(texts, row, strict=True):
                ids = assistant._answer_ids(conversation, text)
                expected, greedy = by_full_forwards(assistant, conversation, ids)
                assert likelihood.log_prob == pytest.approx(expected, abs=2e-4)
                assert (likelihood.is_greedy, likelihood.tokens) == (greedy, len(ids))


@pytest.mark.parametrize(
    "plan",
    [compose([skip_ffn(), skip_kv()]), skip_kv("small", "before_first_token"), fastv(1, 0.5)],
    ids=["evicted", "evicted before", "dropped"],
)
def test_under_plans_that_shrink_the_cache_they_are_those_of_decoding(ours, pictures, plan):
    conversations = asked(("Which colour?", "<image> or <image>?", "How many?"), pictures)
    with ours.under(plan.bind(3)):
        found = ours.log_likelihoods(conversations, [ANSWERS["ours"]] * 3)
        full = []
        for conversation, row in zip(conversations, found, strict=True):
            for text, likelihood in zip(ANSWERS["ours"], row, strict=True):
                ids = ours._answer_ids(conversation, text)
                assert likelihood.log_prob == pytest.approx(by_steps(ours, conversation, ids), abs=2e-4)
                full.append(abs(by_full_forwards(ours, conversation, ids)[0] - likelihood.log_prob))
    assert max(full) > 1e-2  # forwards over everything would have seen what is no longer there


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_they_do_not_depend_on_the_batch_size(assistant, questions, pictures, batch_size):
    texts = ANSWERS["ours" if assistant.is_ours else "foreign"]
    several = [texts, texts[:1], texts[1:]]
    whole = assistant.log_likelihoods(asked(questions, pictures), several)
    cut = assistant.log_likelihoods(asked(questions, pictures), several, batch_size)
    assert [len(row) for row in cut] == [3, 1, 2]
    for one, other in zip(chain.from_iterable(whole), chain.from_iterable(cut), strict=True):
        assert one.log_prob == pytest.approx(other.log_prob, abs=1e-4)
        assert (one.is_greedy, one.tokens) == (other.is_greedy, other.tokens)


def test_what_the_model_says_is_greedy(ours, pictures):
    conversation = Conversation().ask("Which colour?", pictures[:1])
    inputs = ours.encode([conversation])
    said = ours._generate(inputs, Sampling(max_new_tokens=4)).tokens[0].tolist()
    other = [*said[:3], (said[3] + 1) % 256]
    (found,) = continuation_likelihoods(ours.model, lambda rows: inputs, [[said]], ours.pad_id)
    assert found[0].is_greedy
    (found,) = continuation_likelihoods(ours.model, lambda rows: inputs, [[other]], ours.pad_id)
    assert not found[0].is_greedy


def test_a_token_that_ends_answers_may_stand_inside(ours, pictures):
    conversation = Conversation().ask("Which colour?", pictures[:1])
    ids = [114, ours.pad_id, *ours.end_ids, 101]
    ours.model.generation_config.eos_token_id = ours.end_ids
    (found,) = continuation_likelihoods(ours.model, lambda rows: ours.encode([conversation]), [[ids]], ours.pad_id)
    assert found[0].log_prob == pytest.approx(by_steps(ours, conversation, ids), abs=2e-4)


def test_answers_of_one_token_take_no_row_of_their_own(ours, pictures):
    conversation, rows = Conversation().ask("Which colour?", pictures[:1]), []

    def inputs_of(prompts):
        rows.append(prompts)
        return ours.encode([conversation] * len(prompts))

    continuation_likelihoods(ours.model, inputs_of, [[[1], [2, 3], [4], [5, 6, 7]], [[8], [9]]], ours.pad_id)
    assert rows == [[0, 0, 1]]


class Letters:
    """Somebody's processor: a token per letter, and a template that writes ``Q:<question>A:<answer>;``."""

    chat_template = "some"

    def __init__(self, written=lambda turns: "".join(f"{t.role[0]}:{t.text};" for t in turns)):
        self.written = written
        self.tokenizer = lambda text, add_special_tokens: {"input_ids": [ord(letter) for letter in text]}

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        said = [Turn(m["role"], "".join(part["text"] for part in m["content"])) for m in messages]
        return self.written(said) + ("a:" if add_generation_prompt else "")


def test_an_answer_that_stands_in_the_question_too():
    found = chat_answer_ids(Letters(), [Turn("user", "red or blue?")], [], " red ")
    assert "".join(map(chr, found)) == "red"
    with pytest.raises(DataError, match=r"answer 'blue'"):  # a template that leaves the answer out
        chat_answer_ids(Letters(lambda turns: "u:blue;"), [Turn("user", "blue?")], [], "blue")


def test_an_answer_that_the_tokenizer_leaves_out(ours):
    """Not every tokenizer knows every letter: these have no "x"."""
    data = json.loads(ours.processor.tokenizer.backend_tokenizer.to_str())
    del data["model"]["vocab"]["x"]
    ours.processor.tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(data)))
    question = [Turn("user", "Which?")]
    assert len(answer_ids(ours.processor, question, [], "xax")) == 1
    with pytest.raises(DataError, match=r"^answer 'xx': template 'llama3' does not write it"):
        answer_ids(ours.processor, question, [], "xx")
    theirs = Letters()
    theirs.tokenizer = lambda text, add_special_tokens: {"input_ids": [ord(letter) for letter in text if letter != "x"]}
    assert chat_answer_ids(theirs, question, [], "xax") == [ord("a")]
    with pytest.raises(DataError, match=r"^answer 'xx': Letters does not write it"):
        chat_answer_ids(theirs, question, [], "xx")


def test_no_answer_behind_a_line_break():
    theirs = Letters()
    theirs.chat_template = None
    assert chat_answer_ids(theirs, [Turn("user", "Which?")], [], " a ") == [ord("\n"), ord("a")]
    with pytest.raises(DataError, match=r"^answer '': Letters does not write it"):
        chat_answer_ids(theirs, [Turn("user", "Which?")], [], " ")


def test_probabilities_of_all_tokens_sum_to_one(ours, pictures):
    inputs = ours.encode([Conversation().ask("Which colour?", pictures[:1])])
    vocabulary = ours.model.config.text_config.vocab_size
    (found,) = continuation_likelihoods(ours.model, lambda rows: inputs, [[[i] for i in range(vocabulary)]], 0)
    assert torch.tensor([likelihood.log_prob for likelihood in found]).exp().sum() == pytest.approx(1, abs=1e-4)
    assert sum(likelihood.is_greedy for likelihood in found) == 1


def test_a_models_generation_settings_change_nothing(ours, pictures):
    conversation = [Conversation().ask("Which colour?", pictures[:1])]
    plain = ours.log_likelihoods(conversation, [["red red red"]])
    settings = ours.model.generation_config
    settings.repetition_penalty, settings.no_repeat_ngram_size, settings.suppress_tokens = 1.5, 1, [114]
    assert ours.log_likelihoods(conversation, [["red red red"]]) == plain


def test_answers_are_tokenized_as_in_training(ours, pictures):
    turns = (Turn("user", "<image>\nWhich?"),)
    ids = answer_ids(ours.processor, turns, [1], "red")
    sample = ours.processor.encode([*turns, Turn("assistant", "red")], pictures[:1])
    assert [label for label in sample.labels if label != -100] == [*ids, ours.processor.end_id]
    assert ours.processor.tokenizer.decode(ids) == "red"


def test_what_cannot_be_scored(assistant: Assistant, questions, pictures):
    with pytest.raises(DataError, match="answer"):
        assistant.log_likelihoods([Conversation().ask(questions[2])], [[" "]])
    with pytest.raises(DataError, match="end with a question"):
        assistant.log_likelihoods([Conversation()], [["w1"]])
    with pytest.raises(ValueError, match="argument"):
        assistant.log_likelihoods([Conversation().ask(questions[2])], [])
