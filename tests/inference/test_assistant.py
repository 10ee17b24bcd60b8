"""Answers under plans: batches, chats, streams, sampling, and what a reply says it took."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny_vlms import make_family
from transformers import GenerationConfig

from skipvision_train.adapters.chat import chat_messages
from skipvision_train.calibration.bank import BankFacts, PlanBank
from skipvision_train.config.plans import PlanSpec
from skipvision_train.data.records import Turn
from skipvision_train.errors import ConfigError, DataError, PlanError
from skipvision_train.inference import Assistant, Conversation, Sampling, decoding
from skipvision_train.inference.decoding import TextPieces
from skipvision_train.models.identity import model_hash
from skipvision_train.plans import TokenKind, dense, skip_kv, vskip

SHORT = Sampling(max_new_tokens=6)


@torch.no_grad()
def slow_answer(assistant, conversation, plan, steps):
    """Greedy, each step a forward over everything so far; no cache, no ``generate``."""
    with assistant.under(plan):
        inputs, new = assistant.encode([conversation]), []
        length = inputs["input_ids"].shape[1]
        for _ in range(steps):
            token = int(assistant.model(**inputs, use_cache=False).logits[0, -1].argmax())
            new.append(token)
            if token in assistant.end_ids:
                break
            grown = torch.tensor([[token]])
            inputs["input_ids"] = torch.cat([inputs["input_ids"], grown], 1)
            for name, value in (("attention_mask", 1), ("token_kinds", TokenKind.TEXT), ("mm_token_type_ids", 0)):
                if name in inputs:
                    inputs[name] = torch.cat([inputs[name], torch.full_like(grown, int(value))], 1)
    return length, new


@pytest.mark.parametrize("plan", [dense(), vskip([0, 1])], ids=["dense", "vskip"])
def test_a_reply_is_greedy_decoding_under_the_plan(assistant, questions, pictures, plan):
    conversation = Conversation().ask(questions[0], pictures[:1])
    length, expected = slow_answer(assistant, conversation, plan, 6)
    with assistant.under(plan):
        reply = assistant.reply(conversation, SHORT)
    assert reply.text == assistant.processor.tokenizer.decode(expected, skip_special_tokens=True).strip()
    assert reply.tokens == len(expected)
    assert reply.finished == (expected[-1] in assistant.end_ids)
    assert sum(reply.prompt.values()) == length
    visual = {"retained", "middle", "skipped", "summary"} & set(reply.prompt)
    assert "skipped" in visual
    assert reply.first_token_ms > 0
    assert (reply.decode_ms is None) == (reply.tokens == 1)


def test_a_batch_answers_as_one_by_one(assistant, questions, pictures):
    asked = [
        Conversation().ask(questions[0], pictures[:1]),
        Conversation().ask(questions[1], pictures[1:]),
        Conversation().ask(questions[2]),
    ]
    together = assistant.replies(asked, SHORT)
    alone = [assistant.reply(conversation, SHORT) for conversation in asked]
    assert [r.text for r in together] == [r.text for r in alone]
    assert [r.tokens for r in together] == [r.tokens for r in alone]
    assert [r.prompt for r in together] == [r.prompt for r in alone]


def test_a_stream_brings_the_same_text_in_pieces(assistant, questions, pictures):
    conversation = Conversation().ask(questions[0], pictures[:1])
    whole = assistant.reply(conversation, SHORT)
    with assistant.stream(conversation, SHORT) as stream:
        pieces = list(stream)
    assert "".join(pieces).strip() == whole.text
    assert stream.reply.text == whole.text
    assert stream.reply.tokens == whole.tokens


def test_a_stream_that_is_left_ends_its_answer(ours, pictures):
    with ours.stream(Conversation().ask("Why?", pictures[:1]), Sampling(max_new_tokens=200)) as stream:
        next(iter(stream))
    assert not stream.reply.finished
    assert stream.reply.tokens < 200


def test_an_error_on_the_way_reaches_the_reader(ours, pictures, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(ours.model, "generate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(ours.stream(Conversation().ask("Why?", pictures[:1])))


def test_plans_are_exchanged_and_put_back(assistant, questions, pictures):
    conversation, own = Conversation().ask(questions[0], pictures[:1]), assistant.own_plan
    before = assistant.model(**assistant.encode([conversation])).logits
    assert assistant.plan == own
    with assistant.under(vskip([0, 1, 2])):
        assert assistant.plan == vskip([0, 1, 2]).bind(3)
        changed = assistant.model(**assistant.encode([conversation])).logits
    assert assistant.plan == own
    assert torch.equal(assistant.model(**assistant.encode([conversation])).logits, before)
    assert not torch.allclose(changed, before)
    with pytest.raises(PlanError):
        assistant.use(vskip([7]))
    assert assistant.plan == own
    assert torch.equal(assistant.model(**assistant.encode([conversation])).logits, before)


def test_a_plan_that_does_not_fit_leaves_the_one_that_runs(ours, pictures):
    inputs, plan = ours.encode([Conversation().ask("Which?", pictures[:1])]), vskip([0, 1, 2]).bind(3)
    ours.use(plan)
    before = ours.model(**inputs).logits
    with pytest.raises(PlanError):
        ours.use(vskip([7]))
    assert ours.plan == plan
    assert torch.equal(ours.model(**inputs).logits, before)


def test_a_bank_is_another_models_unless_it_names_this_one(ours, tmp_path):
    plan = vskip([1]).bind(3)
    spec = PlanSpec("bank", path=str(tmp_path / "bank"))
    facts = BankFacts(model_hash(ours.model), "dense", "vig", "zero", 0, {"a": []}, {}, "2026-07-01")
    PlanBank.create(tmp_path / "bank", {"a": plan}, plan, facts)
    assert ours.planned(spec) == plan  # the one for questions without a task
    PlanBank.create(tmp_path / "bank", {"a": plan}, plan, replace(facts, model_hash="0" * 64))
    with pytest.raises(PlanError, match="model"):
        ours.planned(spec)


@pytest.mark.parametrize("sampling", [Sampling(max_new_tokens=1), SHORT])
def test_evicted_tokens_take_no_memory(ours, pictures, sampling):
    """The cache of every layer holds two tensors of 2 heads of 8 numbers of 4 bytes per position.

    It grows by the tokens behind the prompt, and keeps room for a sixteenth more.
    """
    conversation = Conversation().ask("Why?", pictures[:1])
    found = {}
    for plan in (dense(), skip_kv()):
        with ours.under(plan):
            reply = ours.reply(conversation, sampling)
        room = held = sum(reply.prompt.values()) - (reply.prompt["skipped"] if plan.evict else 0)
        for _ in range(reply.tokens - 1):
            held += 1
            room = room if held <= room else held + held // 16
        assert reply.kv_bytes == room * 3 * 2 * 2 * 8 * 4
        found[plan.name] = reply.kv_bytes
    assert found["skip_kv"] < found["dense"]


def test_a_chat_is_a_conversation_that_grows(ours, pictures):
    first = Conversation.begin("Be brief.").ask("What is this?", pictures[:1])
    second = first.answered("A set.").ask("And <image> or <image>?", pictures[1:])
    assert [turn.role for turn in second.turns] == ["system", "user", "assistant", "user"]
    assert second.turns[1] == Turn("user", "<image>\nWhat is this?")
    assert second.images == tuple(pictures)
    length, expected = slow_answer(ours, second, ours.own_plan, 4)
    reply = ours.reply(second, Sampling(max_new_tokens=4))
    assert (sum(reply.prompt.values()), reply.tokens) == (length, len(expected))
    assert first.turns == second.turns[:2]  # nothing is changed in place


def test_draws_follow_their_seed(ours, pictures):
    conversation = Conversation().ask("Why?", pictures[:1])
    hot = [ours.reply(conversation, Sampling(8, temperature=5.0, seed=seed)).text for seed in (1, 1, 2, 3)]
    assert hot[0] == hot[1]
    assert len(set(hot)) > 1
    sure = ours.reply(conversation, Sampling(8, temperature=5.0, top_k=1)).text
    assert sure == ours.reply(conversation, Sampling(8)).text


def test_milliseconds_by_a_clock_that_ticks_once_a_token(ours, pictures, monkeypatch):
    """It is read before the prompt, behind it, and behind every token."""
    ticks = (float(tick) for tick in range(100))
    monkeypatch.setattr(decoding, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    reply = ours.reply(Conversation().ask("Which?", pictures[:1]), SHORT)
    assert reply.tokens > 1
    assert (reply.first_token_ms, reply.decode_ms) == (2000, 1000)


def test_opened_from_a_directory(ours, pictures, tmp_path):
    ours.model.save_pretrained(tmp_path / "model")
    ours.processor.save_pretrained(tmp_path / "model")
    vskip([1]).bind(3).save(tmp_path / "plan.json")
    opened = Assistant.open(tmp_path / "model", tmp_path / "plan.json", device="cpu")
    pictures[0].save(tmp_path / "a.png")
    with ours.under(vskip([1])):
        assert opened.ask("Why?", [tmp_path / "a.png"], SHORT) == ours.ask("Why?", pictures[:1], SHORT)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: Conversation().ask("<image> and <image>", p[:1]), "2 <image> markers, but 1 images"),
        (lambda p: Conversation().ask("<image>?", p[:2]), "1 <image> markers, but 2 images"),
        (lambda p: Conversation().ask("a", p[:1]).ask("b"), "the last question has no answer"),
        (lambda p: Conversation().answered("b"), "must end with a question"),
        (lambda p: Conversation().ask("a", ["/none.png"]), "/none.png"),
    ],
)
def test_conversations_that_cannot_be(pictures, make, message):
    with pytest.raises(DataError, match=message):
        make(pictures)


def test_only_a_users_marker_is_an_image(pictures):
    turns = [Turn("system", "an <image>"), Turn("user", "<image> w1"), Turn("assistant", "<image>"), Turn("user", "w2")]
    said = [[part.get("text", part.get("image")) for part in m["content"]] for m in chat_messages(turns, pictures[:1])]
    assert said == [["an <image>"], [pictures[0], "w1"], ["<image>"], ["w2"]]
    family = make_family("qwen2_5_vl")  # without a chat template
    theirs = Assistant(family.model.eval(), family.processor)
    kinds = [
        theirs.kinds(theirs.encode([Conversation.begin(system).ask("w1", pictures[:1])]))
        for system in ("an <image> w3", "an w5 w3")
    ]
    assert torch.equal(*kinds)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_models_generation_settings_choose_no_token(assistant, questions, pictures, temperature):
    conversation, sampling = Conversation().ask(questions[0], pictures[:1]), Sampling(6, temperature, seed=3)
    plain = assistant.reply(conversation, sampling)
    tokens, own = assistant.processor.tokenizer, assistant.model.generation_config
    settings = [
        {"repetition_penalty": 5.0},
        {"guidance_scale": 3.0},
        {"num_beams": 2},
        {"num_beams": 2, "num_return_sequences": 2},
        {"stop_strings": [plain.text[-1]]},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"no_repeat_ngram_size": 1},
        {"bad_words_ids": [[i] for i in tokens(plain.text, add_special_tokens=False)["input_ids"]]},
        {"forced_eos_token_id": 1},
        {"min_p": 1.0, "typical_p": 0.1, "epsilon_cutoff": 0.5, "eta_cutoff": 0.5},
        {"max_length": 3, "max_time": 1e-9, "do_sample": temperature == 0},
        {"sequence_bias": [[[7], 100.0]], "suppress_tokens": [1, 2], "begin_suppress_tokens": [3]},
    ]
    for given in settings:
        assistant.model.generation_config = GenerationConfig(**{"eos_token_id": own.eos_token_id, **given})
        reply = assistant.reply(conversation, sampling)
        assert (reply.text, reply.tokens) == (plain.text, plain.tokens), given


def test_a_models_generation_settings_say_what_ends_an_answer(pictures):
    family = make_family("llava")
    theirs, conversation = Assistant(family.model.eval(), family.processor), Conversation().ask("w1 w2")
    whole = theirs.answer(inputs := theirs.encode([conversation]), SHORT)[0]
    first = int(theirs.model(**inputs).logits[0, -1].argmax())
    theirs.model.generation_config.eos_token_id = [first]
    assert (whole.tokens, theirs.reply(conversation, SHORT).tokens) == (6, 1)


def test_nothing_asked(ours):
    with pytest.raises(DataError, match="must end with a question"):
        ours.reply(Conversation.begin("Be brief."))


@pytest.mark.parametrize(
    "values", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}]
)
def test_sampling_out_of_range(values):
    (name,) = values
    with pytest.raises(ConfigError, match=f"^{name}: "):
        Sampling(**values)


def test_characters_of_several_tokens_come_whole(ours):
    text = "né 東京!"
    ids = ours.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) > len(text)
    pieces = TextPieces(ours.processor.tokenizer)
    shown = [pieces.add(token) for token in ids]
    assert "".join(shown) == text
    assert all(len(piece) <= 1 for piece in shown)
    cut = TextPieces(ours.processor.tokenizer)
    assert [cut.add(token) for token in ids[:2]] == ["n", ""]
    assert cut.rest() == "\N{REPLACEMENT CHARACTER}"
