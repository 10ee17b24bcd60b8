"""Tokens per second of whole answers: ours against plain transformers, and the skip KV-cache against dense.

OMP_NUM_THREADS=1 python benchmarks/generate.py --clock cpu            # CPU, 4 layers of width 512
python benchmarks/generate.py --geometry llava_1_5_7b --new 32 128 --batch 1 8

Timed: everything from an image and a question to the answer's text: processor, tower, prefill, decoding, detokenizing.
"transformers" calls LLaVA's processor, `generate` and `batch_decode` itself, and does so once more in every round: how
far "transformers again" is from 1 is what the machine adds. The others answer through `Assistant`:
the same LLaVA, with the same weights, and our model with LLaVA's decoder weights, an MLP connector and as many visual
tokens. The end token is never likely, so that every answer has its full length. Under the skip KV-cache all visual
tokens of LLaVA leave the cache after the first token; in our model what was not retained leaves it and skips the FFNs.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from harness import (
    DTYPES,
    GEOMETRIES,
    HEAD_WIDTH,
    Sample,
    Stopwatch,
    decoder_config,
    interleave,
    median,
    parse_timing,
    timing_parser,
)
from output import finish, header, table
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from skipvision_train.data.messages import chat_template
from skipvision_train.data.processor import SkipVisionProcessor
from skipvision_train.inference import Assistant, Conversation, Sampling
from skipvision_train.models.configuration import SkipVisionConfig
from skipvision_train.models.connector_settings import MlpConfig
from skipvision_train.models.modeling import SkipVisionForConditionalGeneration
from skipvision_train.models.settings import ReducerConfig, VisionConfig
from skipvision_train.plans import SkipPlan, compose, dense, skip_ffn, skip_kv

PATCH = 14
TOWER_WIDTH, TOWER_LAYERS, TOWER_HEADS = 256, 2, 4
CONTROL = ("begin_of_text", "end_of_text", "image", "start_header_id", "end_header_id", "eot_id")
QUESTION = "What is to be seen in this picture, and what is it made of? Answer at length."

STOCK, AGAIN = "transformers", "transformers again"
CASES: dict[str, tuple[str, SkipPlan]] = {
    "LLaVA, dense": ("llava", dense()),
    "ours, dense": ("ours", dense()),
    "LLaVA, skip KV-cache": ("llava", skip_kv()),
    "ours, Skip-FFN and skip KV-cache": ("ours, skipping", compose([skip_ffn(), skip_kv()])),
}
"""Model and plan of what answers through :class:`Assistant`."""

COLUMNS = {
    "ms": "ms",
    "tokens_per_second": "tokens/s",
    "speed": "speed of transformers",
    "spread": "±",
    "speed_of_dense": "speed of dense",
    "spread_of_dense": "±",
    "decode_ms": "ms per step",
    "cache_bytes": "cache MiB",
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """256 bytes and LLaMA-3's control tokens, one of which stands for an image."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = [f"<|{name}|>" for name in CONTROL]
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in names])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=names[0], eos_token=names[-1], pad_token=names[1], padding_side="left"
    )


def make_llava(text: LlamaConfig, visual: int, args: argparse.Namespace) -> Assistant:
    """transformers' LLaVA over a small tower, with random weights."""
    side, tokenizer = PATCH * math.isqrt(visual), make_tokenizer()
    image = tokenizer.get_vocab()["<|image|>"]
    tower = CLIPVisionConfig(
        hidden_size=TOWER_WIDTH,
        intermediate_size=4 * TOWER_WIDTH,
        num_hidden_layers=TOWER_LAYERS,
        num_attention_heads=TOWER_HEADS,
        image_size=side,
        patch_size=PATCH,
    )
    config = LlavaConfig(vision_config=tower, text_config=text, image_token_index=image, image_seq_length=visual)
    torch.manual_seed(0)
    with torch.device(args.device):
        model = LlavaForConditionalGeneration._from_config(config, dtype=DTYPES[args.dtype]).eval()
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] = 0  # below the largest of the others: no answer ends early
    size = {"height": side, "width": side}
    processor = LlavaProcessor(
        LlavaImageProcessor(size={"shortest_edge": side}, crop_size=size),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        image_token="<|image|>",
        num_additional_image_tokens=1,
        chat_template=chat_template("llama3", "<|image|>"),  # what our models write, too
    )
    return Assistant(model, processor)


def make_ours(llava: Assistant, visual: int, reducer: ReducerConfig, args: argparse.Namespace) -> Assistant:
    """Our model around the decoder of ``llava``, the same tensors."""
    tokenizer = make_tokenizer()
    config = SkipVisionConfig(
        text_config=llava.model.config.text_config,
        vision=VisionConfig(
            image_size=PATCH * math.isqrt(visual),
            patch_size=PATCH,
            width=TOWER_WIDTH,
            layers=TOWER_LAYERS,
            heads=TOWER_HEADS,
            depths=(TOWER_LAYERS - 1,),
        ),
        connector=MlpConfig(),
        reducer=reducer,
        image_token_id=int(llava.model.config.image_token_id),
    )
    torch.manual_seed(0)
    with torch.device(args.device):
        model: Any = SkipVisionForConditionalGeneration(config)
    model = model.to(DTYPES[args.dtype]).eval()
    model.language_model.model.load_state_dict(llava.model.model.language_model.state_dict(), assign=True)
    model.language_model.lm_head.load_state_dict(llava.model.lm_head.state_dict(), assign=True)
    return Assistant(model, SkipVisionProcessor.from_config(config, tokenizer))


def make_assistants(text: LlamaConfig, visual: int, args: argparse.Namespace) -> dict[str, Assistant]:
    """The models of ``CASES`` over one decoder: of the skipping one about a sixth of the visual tokens is retained."""
    llava = make_llava(text, visual, args)
    whole = ReducerConfig(split="none", local_keep=None, summary="none", last_local_ffn=False)
    skipping = replace(whole, split="saliency", retain=visual * 100 // 576)
    return {
        "llava": llava,
        "ours": make_ours(llava, visual, whole, args),
        "ours, skipping": make_ours(llava, visual, skipping, args),
    }


@torch.no_grad()
def plainly(llava: Assistant, images: Sequence[Image.Image], new: int, clock: str) -> Sample:
    """What a user of transformers writes."""
    model, processor = llava.model, llava.processor
    with Stopwatch(model.device, clock) as watch:
        question = {"type": "text", "text": QUESTION}
        chats = [[{"role": "user", "content": [{"type": "image", "image": image}, question]}] for image in images]
        inputs = processor.apply_chat_template(
            chats,
            tokenize=True,
            return_dict=True,
            add_generation_prompt=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        ).to(model.device, model.dtype)
        ids = model.generate(
            **inputs,
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=processor.tokenizer.eos_token_id,
            pad_token_id=processor.tokenizer.pad_token_id,
        )
        answers = ids[:, inputs["input_ids"].shape[1] :]
        processor.batch_decode(answers, skip_special_tokens=True)
    assert answers.shape == (len(images), new)
    return Sample(watch.seconds, watch.peak_bytes)


def assisted(
    assistant: Assistant,
    plan: SkipPlan,
    images: Sequence[Image.Image],
    new: int,
    clock: str,
    steps: list[float],
) -> Sample:
    """The same through :class:`Assistant`; ``steps`` gets the milliseconds per step."""
    with assistant.under(plan):  # exchanging plans is no part of answering
        asked = [Conversation().ask(QUESTION, [image]) for image in images]
        with Stopwatch(assistant.model.device, clock) as watch:
            replies = assistant.replies(asked, Sampling(new))
    assert all(reply.tokens == new for reply in replies)
    steps.append(replies[0].decode_ms or 0.0)
    return Sample(watch.seconds, watch.peak_bytes, round(sum(reply.kv_bytes for reply in replies)))


def speed(own: Sequence[Sample], base: Sequence[Sample]) -> tuple[float, float]:
    """How many times as fast as ``base``: the median over the rounds, and half the interquartile range."""
    ratios = torch.tensor([b.seconds / a.seconds for a, b in zip(own, base, strict=True)], dtype=torch.float64)
    low, middle, high = ratios.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
    return middle, (high - low) / 2


def measure_setting(
    assistants: dict[str, Assistant], images: Sequence[Image.Image], new: int, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """All cases at one batch and length."""
    steps: dict[str, list[float]] = {name: [] for name in CASES}
    plain = partial(plainly, assistants["llava"], images, new, args.clock)
    runs: dict[str, Callable[[], Sample]] = {STOCK: plain, AGAIN: plain}
    for name, (model, plan) in CASES.items():
        runs[name] = partial(assisted, assistants[model], plan, images, new, args.clock, steps[name])
    samples, refused = interleave(runs, args.repeats, args.warmup, "batch of answers")
    rows = []
    for name in runs:
        row: dict[str, Any] = {"case": name, "refused": refused.get(name)} | dict.fromkeys(COLUMNS)
        if name in samples:
            own = samples[name]
            milliseconds = 1000 * median([sample.seconds for sample in own])
            row |= {"ms": milliseconds, "tokens_per_second": 1000 * len(images) * new / milliseconds}
            row["speed"], row["spread"] = speed(own, samples[STOCK])
            if name in CASES:
                base = samples[f"{name.split(',')[0]}, dense"]
                row["speed_of_dense"], row["spread_of_dense"] = speed(own, base)
                row["decode_ms"] = median(steps[name][args.warmup :])
                row["cache_bytes"] = own[0].cache_bytes
        rows.append(row)
    return rows


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, checked."""
    parser = timing_parser(__doc__)
    parser.add_argument("--geometry", choices=GEOMETRIES, default="cpu", help="of the decoder")
    parser.add_argument("--width", type=int, help="another width than the geometry's; the FFN scales with it")
    parser.add_argument("--visual", type=int, default=576, help="visual tokens of an image, a square number")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="rows; several are run")
    parser.add_argument("--new", type=int, nargs="+", default=[32, 256], help="tokens of an answer; several are run")
    parser.add_argument("--dtype", choices=DTYPES, help="fp32 on the CPU and bf16 elsewhere unless given")
    parser.set_defaults(text=len(QUESTION), backend="auto")
    args = parse_timing(parser, argv)
    args.dtype = args.dtype or ("fp32" if args.device == "cpu" else "bf16")
    if args.visual < 4 or math.isqrt(args.visual) ** 2 != args.visual:
        parser.error(f"--visual {args.visual}: a square number from 4 on is needed, such as 576")
    if min(args.new) < 2:
        parser.error(f"--new {min(args.new)}: at least 2 are needed")
    unit = HEAD_WIDTH * GEOMETRIES[args.geometry].queries_per_key
    if args.width is not None and (args.width <= 0 or args.width % unit):
        parser.error(f"--width {args.width}: {args.geometry} needs a positive multiple of {unit}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark; ``argv`` as on the command line."""
    args = parse_options(argv)
    text = decoder_config(args)
    text.bos_token_id = text.eos_token_id = text.pad_token_id = None
    head = header(args, text)
    print("\n".join(f"{name}: {value}" for name, value in head.items()))
    assistants = make_assistants(text, args.visual, args)
    side, results = PATCH * math.isqrt(args.visual), []
    for batch in args.batch:
        images = [Image.effect_noise((side, side), 40 + i).convert("RGB") for i in range(batch)]
        for new in args.new:
            rows = measure_setting(assistants, images, new, args)
            title = f"Answers of {new} tokens, batch {batch}, {args.visual} visual tokens"
            print("\n".join(table(title, COLUMNS, rows)), flush=True)
            results += [{**row, "visual": args.visual, "batch": batch, "new": new} for row in rows]
    finish(args, head, results)


if __name__ == "__main__":
    main()
