"""The mechanics of ``apply``: what it reads, what it refuses, causal language models, our own model, wrappers."""

import copy

import pytest
import torch
from transformers import (
    DynamicCache,
    LlavaForConditionalGeneration,
    LogitsProcessorList,
)

import skipvision_train
from skipvision_train.adapters import apply
from skipvision_train.errors import PlanError
from skipvision_train.models.modeling import SkipVisionForConditionalGeneration
from skipvision_train.plans import (
    SkipPlan,
    TokenLayout,
    attach,
    compose,
    dense,
    fastv,
    ffn_skip,
    shortv,
    skip_ffn,
    skip_kv,
    victor,
    vskip,
    vtw,
)

IMAGE = 5
STATIC = compose([vskip([0, 2], bypass="norm"), ffn_skip([1])])


@torch.no_grad()
def logits_of(model, plan, *args, ids=None, **inputs):
    tokens = {} if ids is None else {"image_token_id": ids}
    with apply(model, plan, **tokens):
        return model(*args, **inputs).logits


def layout_of(ids, *skipped):
    kinds = torch.zeros_like(ids)
    kinds[:, list(skipped)] = 2
    return TokenLayout.from_kinds(kinds)


def test_the_package_exports_apply_and_plans():
    assert skipvision_train.apply is apply
    assert skipvision_train.plans.vskip is vskip


# --- what is read --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_causal_lm_with_image_tokens_of_the_caller_equals_attach(lm):
    ids = torch.tensor([[20, 21, IMAGE, 6, IMAGE, 22, 23]])
    with attach(lm, STATIC):
        expected = lm(ids, token_layout=layout_of(ids, 2, 3, 4)).logits
        one_kind = lm(ids, token_layout=layout_of(ids, 2, 4)).logits
    assert torch.equal(logits_of(lm, STATIC, ids, ids=[IMAGE, 6]), expected)
    assert torch.equal(logits_of(lm, STATIC, input_ids=ids, ids=IMAGE), one_kind)
    assert not torch.equal(expected, one_kind)
    with apply(lm.model, STATIC, image_token_id=IMAGE):
        assert torch.equal(lm(ids).logits, one_kind)


def test_positional_arguments_are_read_by_name(llava):
    inputs = llava.inputs(0, 1)
    expected = logits_of(llava.model, STATIC, **inputs)
    by_place = [inputs[key] for key in ("input_ids", "pixel_values", "attention_mask")]
    assert torch.equal(logits_of(llava.model, STATIC, *by_place), expected)


@torch.no_grad()
def test_the_backend_is_handed_on(llava):
    inputs = llava.inputs(0, 1)
    with apply(llava.model, STATIC, backend="eager"):
        assert llava.decoder._skip_backend == "eager"
        eager = llava.model(**inputs).logits
    text = (inputs["input_ids"] != llava.image_token_id) & inputs["attention_mask"].bool()
    torch.testing.assert_close(eager[text], logits_of(llava.model, STATIC, **inputs)[text], atol=1e-5, rtol=1e-4)
    with pytest.raises(PlanError, match="no_such_backend"):
        apply(llava.model, STATIC, backend="no_such_backend")


def test_the_configured_image_token_can_be_overridden(llava, kit):
    inputs = llava.inputs(1)
    as_text = logits_of(llava.model, vskip([0]), ids=kit.ids["w6"], **inputs)
    assert (as_text - logits_of(llava.model, vskip([0]), **inputs)).abs().max() > 1e-3


@pytest.mark.parametrize("family_name", ["qwen2_5_vl", "qwen3_vl", "llava_onevision"])
def test_videos_are_visual(shared_family, kit, family_name):
    family = shared_family(family_name)
    marker = family.marker.replace("image", "video")
    video = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    inputs = family.processor(videos=[video], text=[f"w1 {marker} w2 w3"], return_tensors="pt", do_sample_frames=False)
    visual = inputs["input_ids"] == family.model.config.video_token_id
    assert visual.sum() >= 2
    stock = logits_of(family.model, dense(), **inputs)
    changed = logits_of(family.model, shortv([kit.layers - 1]), **inputs)
    torch.testing.assert_close(changed[~visual], stock[~visual], atol=1e-5, rtol=0)
    assert ((changed - stock)[visual].abs().amax(-1) > 1e-3).all()


def test_labels_say_who_ranks(lm):
    """Of two turns the tokens before each answer rank; with labels of one, a training forward ranks as its prompt."""
    ids = torch.tensor([[20, *[IMAGE] * 4, 21, 22, 23, 24, 25]])
    ids[0, 1:5] = torch.tensor([IMAGE, 6, 7, 8])
    plan, visual = fastv(1, 0.5), [IMAGE, 6, 7, 8]
    with torch.no_grad(), apply(lm, plan, image_token_id=visual):
        whole = lm(ids).logits
        kept = {}
        for start in (6, 7, 8):
            labels = ids.where(torch.arange(10) >= start, -100)
            kept[start] = lm(ids, labels=labels).logits
            torch.testing.assert_close(kept[start][:, :start], lm(ids[:, :start]).logits, atol=1e-5, rtol=1e-4)
        none = lm(ids, labels=torch.full_like(ids, -100)).logits
    with torch.no_grad():
        torch.testing.assert_close(none, lm(ids).logits, atol=1e-5, rtol=1e-4)
    assert any(not torch.allclose(logits, whole, atol=1e-3) for logits in kept.values())


@torch.no_grad()
def test_packed_rows_without_a_mask_stay_apart(lm):
    ids = torch.tensor([[20, IMAGE, 21, 22, IMAGE, IMAGE, 23, 24]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    with apply(lm, STATIC, image_token_id=IMAGE):
        packed = lm(ids, position_ids=positions, use_cache=False).logits
        for part in (slice(0, 3), slice(3, 8)):
            torch.testing.assert_close(packed[:, part], lm(ids[:, part]).logits, atol=1e-5, rtol=1e-4)


def test_victor_drops_the_image_and_keeps_the_registers(llava, kit):
    text = [f"w1 {llava.marker} <reg><reg> w2 w3", "w4 w5"]
    batch = llava.processor(images=llava.images[:1], text=text, padding=True, return_tensors="pt")
    kept = batch["input_ids"] != llava.image_token_id
    with torch.no_grad(), apply(llava.model, victor(1, 2), register_token_id=kit.ids["<reg>"]):
        logits = llava.model(**batch).logits
    assert torch.equal(logits[kept], logits_of(llava.model, vtw(1), **batch)[kept])
    with apply(llava.model, SkipPlan("summary", vskip([0]).bind(3).rules), register_token_id=kit.ids["<reg>"]):
        pass
    without = llava.inputs(1)
    with apply(llava.model, victor(1, 2), register_token_id=kit.ids["<reg>"]):
        with pytest.raises(PlanError, match="row 0 has an image and 0 registers"):
            llava.model(**without)
        llava.model(**llava.inputs(2))


# --- decoding ------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("plan", [STATIC, skip_ffn(evict=()), skip_ffn(), vtw(1)], ids=lambda plan: plan.name)
def test_a_manual_loop_without_positions_equals_generate(llava, plan):
    """Rows padded by different amounts: positions count the real tokens in the prefill and in every step."""
    inputs = llava.inputs(0, 1, 2)
    with apply(llava.model, plan):
        sequences = llava.model.generate(**inputs, max_new_tokens=4, do_sample=False)
        cache, mask = DynamicCache(), inputs["attention_mask"]
        out = llava.model(**inputs, past_key_values=cache)
        tokens, steps = [], []
        for _ in range(4):
            steps.append(out.logits[:, -1])
            tokens.append(steps[-1].argmax(-1))
            mask = torch.cat([mask, mask.new_ones(3, 1)], dim=-1)
            out = llava.model(input_ids=tokens[-1][:, None], attention_mask=mask, past_key_values=cache)
        assert torch.equal(torch.stack(tokens, dim=1), sequences[:, -4:])
        whole = llava.model.generate(
            **inputs, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
        ).logits
    torch.testing.assert_close(torch.stack(steps), torch.stack(whole), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_generated_image_token_is_text(lm):
    ids = torch.tensor([[20, IMAGE, IMAGE, 21, 22]])
    plan = compose([ffn_skip([0, 1, 2]), skip_kv()])

    def image_token_second(tokens, scores):
        chosen = torch.tensor(IMAGE) if tokens.shape[1] == 6 else scores.argmax(-1)
        return torch.nn.functional.one_hot(chosen.expand(1), scores.shape[1]).float()

    with apply(lm, ffn_skip([0, 1, 2]), image_token_id=IMAGE):
        out = lm.generate(
            ids,
            max_new_tokens=4,
            do_sample=False,
            logits_processor=LogitsProcessorList([image_token_second]),
            output_logits=True,
            return_dict_in_generate=True,
        )
    assert out.sequences[0, 6] == IMAGE
    with attach(lm, ffn_skip([0, 1, 2])):
        whole = lm(out.sequences, token_layout=layout_of(out.sequences, 1, 2)).logits[:, 4:8]
    torch.testing.assert_close(torch.stack(out.logits, dim=1), whole, atol=1e-5, rtol=1e-4)
    with apply(lm, plan, image_token_id=IMAGE):
        cache = DynamicCache()
        lm(ids, past_key_values=cache)
        lm(torch.tensor([[IMAGE]]), past_key_values=cache)
        assert cache.get_seq_length() == 6


@torch.no_grad()
def test_beams_and_recomputation_equal_themselves(llava):
    """With as many beams as rows of a batch repeated, and without a cache: the layout follows every forward."""
    inputs = llava.inputs(0, 1)
    with apply(llava.model, STATIC):
        greedy = llava.model.generate(**inputs, max_new_tokens=3, do_sample=False)
        again = llava.model.generate(**inputs, max_new_tokens=3, do_sample=False, use_cache=False)
        batched = llava.model.generate(**inputs, max_new_tokens=3, do_sample=False, num_beams=2)
        alone = llava.model.generate(**llava.inputs(1), max_new_tokens=3, do_sample=False, num_beams=2)
    assert torch.equal(greedy, again)
    assert torch.equal(batched[1, -3:], alone[0, -3:])


@torch.no_grad()
def test_a_second_image_may_follow_on_a_filled_cache(llava):
    inputs = llava.inputs(0)
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    second = int((ids[0] == llava.image_token_id).nonzero()[4])
    expected = logits_of(llava.model, STATIC, **inputs)
    with apply(llava.model, STATIC):
        cache = DynamicCache()
        first = llava.model(ids[:, :second], pixels[:1], past_key_values=cache).logits
        rest = llava.model(ids[:, second:], pixels[1:], inputs["attention_mask"], past_key_values=cache).logits
    torch.testing.assert_close(torch.cat([first, rest], dim=1), expected, atol=1e-5, rtol=1e-4)
    with apply(llava.model, skip_ffn()):
        cache = DynamicCache()
        llava.model(ids[:, :second], pixels[:1], past_key_values=cache)
        with pytest.raises(PlanError, match="start again with the whole conversation"):
            llava.model(ids[:, second:], pixels[1:], inputs["attention_mask"], past_key_values=cache)


@torch.no_grad()
def test_prefill_in_chunks_equals_prefill(llava, lm):
    inputs = llava.inputs(0)
    ids = torch.tensor([[20, IMAGE, 21, IMAGE, IMAGE, 22, 23]])
    greedy = {**inputs, "max_new_tokens": 3, "do_sample": False}
    if not torch.equal(llava.model.generate(**greedy), llava.model.generate(**greedy, prefill_chunk_size=6)):
        pytest.skip("this transformers loses images when it prefills in chunks")
    with apply(llava.model, STATIC):
        whole = llava.model.generate(**greedy)
        assert torch.equal(llava.model.generate(**greedy, prefill_chunk_size=6), whole)
    with apply(lm, STATIC, image_token_id=IMAGE):
        whole = lm.generate(ids, max_new_tokens=3, do_sample=False)
        assert torch.equal(lm.generate(ids, max_new_tokens=3, do_sample=False, prefill_chunk_size=3), whole)


# --- models and wrappers -------------------------------------------------------------------------------------------


class Wrapper(torch.nn.Module):
    """As PEFT does it: ``generate`` goes past the wrapper's forward, a forward goes through it."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, **inputs):
        return self.inner(**inputs)


@torch.no_grad()
def test_a_wrapped_model_runs_its_plan_in_forward_and_in_generate(llava):
    inputs, wrapper = llava.inputs(0), Wrapper(llava.model)
    expected = logits_of(llava.model, STATIC, **inputs)
    with apply(wrapper, STATIC):
        assert torch.equal(wrapper(**inputs).logits, expected)
        assert torch.equal(wrapper.inner(**inputs).logits, expected)


@torch.no_grad()
def test_a_copy_of_the_model_is_independent(llava):
    inputs = llava.inputs(0, 1)
    stock = llava.model(**inputs).logits
    with apply(llava.model, STATIC):
        expected = llava.model(**inputs).logits
        twin = copy.deepcopy(llava.model)
    assert torch.equal(twin(**inputs).logits, expected)
    assert torch.equal(llava.model(**inputs).logits, stock)


@torch.no_grad()
def test_save_pretrained_under_a_plan(kit, tmp_path):
    family = kit.make_family("llava")
    inputs = family.inputs(0)
    with apply(family.model, STATIC):
        family.model.save_pretrained(tmp_path)
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert torch.equal(again(**inputs).logits, family.model(**inputs).logits)
    assert again.config.to_dict().keys() == family.model.config.to_dict().keys()


@torch.no_grad()
def test_our_own_model_gets_its_former_plan_back(tiny_config, kit):
    model = SkipVisionForConditionalGeneration(tiny_config).eval()
    kit.randomise(model)
    former = skip_ffn(evict=()).bind(3)
    model.set_plan(former)
    visual = len(tiny_config.image_token_kinds())
    inputs = {
        "input_ids": torch.tensor([[5, *[tiny_config.image_token_id] * visual, 6, 7]]),
        "pixel_values": torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)),
    }
    before = model(**inputs).logits
    with pytest.raises(RuntimeError, match="inside"), apply(model, vskip([0, 1])) as applied:  # noqa: PT012
        assert model.plan == applied.plan == vskip([0, 1]).bind(3)
        assert not torch.equal(model(**inputs).logits, before)
        raise RuntimeError("inside")
    assert model.plan == former
    assert torch.equal(model(**inputs).logits, before)
    with apply(model, dense()), apply(model, shortv([1])):
        assert model.plan.name == "shortv"
    assert model.plan == former
    with pytest.raises(PlanError, match="SkipVisionForConditionalGeneration knows its own tokens"):
        apply(model, dense(), image_token_id=3)
    with pytest.raises(PlanError, match="chooses its own; leave backend='sdpa' out"):
        apply(model, dense(), backend="sdpa")
    with pytest.raises(PlanError, match="has 4 layers, the model has 3"):
        apply(model, vskip([0]).bind(4))
    assert model.plan == former
