"""torch.compile: a layer under a plan is one graph, a model under a plan gives what it gives uncompiled."""

import pytest
import torch

from skipvision_train.plans import attach, backends, dense, shortv, skip_ffn, vskip, vtw
from skipvision_train.plans.run import PlanRun, run_layer

CPU = torch.device("cpu")
IMAGES_IN_TEXT = ("ttrryssytttrrtt", "....ttsssttrryt")
COMPILED = {
    "skip_ffn": skip_ffn(evict=()),
    "vskip": vskip([0, 1, 2]),
    "vskip_norm": vskip([0, 1, 2], bypass="norm"),
    "shortv": shortv([0, 1, 2]),
    "vtw": vtw(1),
}


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("name", COMPILED)
def test_a_layer_is_one_graph(kit, model, name, backend, fresh_compiler):
    """``fullgraph`` raises where the compiler would have to leave the graph."""
    layout, plan, decoder = kit.layout_of(*IMAGES_IN_TEXT), COMPILED[name].bind(3), model.model
    chosen = backends.select_backend(backend, CPU, torch.float32, 4, 0.0)
    hidden = torch.randn(*layout.kinds.shape, 16, generator=torch.Generator().manual_seed(0))
    rotary = decoder.rotary_emb(hidden, layout.position_ids)
    run = PlanRun(plan, layout, CPU, chosen, decoder.rotary_emb)
    rest = {"position_embeddings": rotary, "attention_mask": layout.visible()[:, None]}
    compiled, ran = torch.compile(run_layer, fullgraph=True, backend="eager"), 0
    with attach(model, plan):
        for layer, rule in zip(decoder.layers[:2], plan.rules, strict=False):
            hidden, work = run.enter(layer, hidden, rotary)
            if work is not None:
                expected = run_layer(layer, rule, work, chosen.kernel, hidden, **rest)
                got = compiled(layer, rule, work, chosen.kernel, hidden, **rest)
                torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)
                ran += 1
    assert ran == (1 if name == "vtw" else 2)


@pytest.mark.parametrize("plan", [dense(), shortv([0, 2]), vtw(1)], ids=lambda plan: plan.name)
def test_a_compiled_model_runs_the_plan(kit, model, plan, fresh_compiler):
    layout = kit.layout_of(*IMAGES_IN_TEXT)
    ids = kit.ids_for(layout)
    call = {"use_cache": False}
    with attach(model, plan) as attachment, torch.no_grad():
        if attachment.active:
            call |= {"token_layout": layout}
        else:
            call |= {"attention_mask": layout.attention_mask, "position_ids": layout.position_ids}
        expected = model(ids, **call).logits
        got = torch.compile(model, backend="eager")(ids, **call).logits
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)
