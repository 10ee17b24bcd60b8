"""A server with a tiny model, and visitors who talk to it over real connections."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from functools import partial

import pytest
import torch
from byte_tokenizer import IMAGE_TOKEN, byte_tokenizer
from serve_visitors import Visitor, running

from skipvision_train.data.processor import SkipVisionProcessor
from skipvision_train.inference import Assistant, Sampling
from skipvision_train.models.modeling import SkipVisionForConditionalGeneration
from skipvision_train.plans import skip_ffn
from skipvision_train.serve.answering import Answering, choices
from skipvision_train.serve.app import make_app
from skipvision_train.serve.limits import Limits


@pytest.fixture
def assistant(config_factory):
    """Weights large enough that the answer depends on image and question."""
    tokenizer = byte_tokenizer()
    config = config_factory(
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), skip_plan=skip_ffn().bind(3).to_dict()
    )
    torch.manual_seed(0)
    model = SkipVisionForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.language_model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    return Assistant(model, SkipVisionProcessor.from_config(config, tokenizer))


class Gate(Answering):
    """Answers when it is told to, so that nothing in a test depends on time; raises what it is given instead."""

    def __init__(self, *arguments, **more):
        super().__init__(*arguments, **more)
        self.is_open = threading.Event()
        self.is_open.set()
        self.errors: list[BaseException] = []
        self.began = threading.Semaphore(0)

    def __call__(self, job, give):
        self.began.release()
        assert self.is_open.wait(30)
        if self.errors:
            raise self.errors.pop(0)
        return super().__call__(job, give)


@pytest.fixture
def serve(assistant):
    """Start a server: gives its answering and a function that makes visitors."""
    with ExitStack() as stack:
        yield partial(begin, stack, assistant)


def begin(stack, assistant, system=None, plans=(), new_tokens=6, names=None, **limits):
    bounds = Limits(**{"questions_per_minute": 1000, "sessions_per_minute": 1000, **limits})
    bounds.check()
    known = choices(assistant, list(plans))
    answering = Gate(assistant, known, Sampling(max_new_tokens=new_tokens), bounds, system)
    app = make_app(answering, bounds, "tiny", names)
    answering.server = app.state.server
    address = stack.enter_context(running(app))

    def visitor(**more):
        return stack.enter_context(Visitor(address, **more))

    return answering, visitor


@pytest.fixture(scope="module")
def strict():
    """The server with narrow limits of a module's tests, started by the first that needs it."""
    with ExitStack() as stack:
        yield stack, []


@pytest.fixture
def someone(strict, assistant):
    """A new visitor of a server with narrow limits."""
    stack, started = strict
    if not started:
        started.append(
            begin(
                *(stack, assistant),
                upload_mb=0.1,
                memory_mb=1.2,
                pixels=10_000,
                images=2,
                chat_images=3,
                characters=50,
                tokens=20,
                uploads_per_minute=1000,
            )
        )
    visitor = started[0][1]()
    visitor.come()
    return visitor
