"""What a plan saves: prefill of a random LLaMA, dense against plans, interleaved in one run; ratios only.

python benchmarks/executor.py                                   # CPU, a model of a few million parameters
python benchmarks/executor.py --preset llama3_8b --dtype bf16   # one GPU
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from skipvision_train.analysis.flops import sequence_flops
from skipvision_train.plans import SkipPlan, TokenKind, TokenLayout, attach, dense, shortv, skip_ffn, vskip

PRESETS = {
    "small": {"hidden_size": 512, "intermediate_size": 1792, "num_hidden_layers": 8, "num_attention_heads": 8},
    "llama3_8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
}


def make_model(preset: str, dtype: torch.dtype, device: str) -> LlamaForCausalLM:
    """A LLaMA with random weights and a vocabulary of 1,000: the LM head is not what is measured."""
    sizes = PRESETS[preset]
    config = LlamaConfig(vocab_size=1000, num_key_value_heads=sizes["num_attention_heads"] // 4, **sizes)
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(config).to(dtype).eval()


def make_layout(batch: int, retained: int, skipped: int, text: int) -> TokenLayout:
    """A prompt: 35 text tokens, one image, the rest of the text."""
    kinds = [TokenKind.TEXT] * 35 + [TokenKind.RETAINED] * retained + [TokenKind.SKIPPED] * skipped
    kinds += [TokenKind.TEXT] * max(1, text - 35)
    return TokenLayout.from_kinds(torch.tensor([[int(k) for k in kinds]] * batch))


@torch.inference_mode()
def prefill_seconds(model: LlamaForCausalLM, embeds: torch.Tensor, layout: TokenLayout, plan: SkipPlan) -> float:
    """One prefill, in seconds."""
    with attach(model, plan) as attachment:
        extra = {"token_layout": layout} if attachment.active else {}
        _synchronise(embeds.device)
        start = time.perf_counter()
        model.model(inputs_embeds=embeds, **extra)
        _synchronise(embeds.device)
        return time.perf_counter() - start


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--retained", type=int, default=274, help="visual tokens that run the FFN")
    parser.add_argument("--skipped", type=int, default=255, help="visual tokens that Skip-FFN leaves out")
    parser.add_argument("--text", type=int, default=67)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()

    model = make_model(args.preset, {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype], args.device)
    depth = model.config.num_hidden_layers
    half = list(range(depth // 2, depth))
    plans = [dense(depth), skip_ffn(depth, evict=()), vskip(depth, half), shortv(depth, half)]
    layout = make_layout(args.batch, args.retained, args.skipped, args.text)
    embeds = torch.randn(*layout.kinds.shape, model.config.hidden_size, device=args.device, dtype=model.dtype)
    seconds: dict[str, list[float]] = {plan.name: [] for plan in plans}
    for repeat in range(args.repeats + 1):  # the first round warms up
        for plan in plans:
            elapsed = prefill_seconds(model, embeds, layout, plan)
            if repeat:
                seconds[plan.name].append(elapsed)
    counts = {kind: int((layout.kinds[0] == kind).sum()) for kind in TokenKind}
    base_time = statistics.median(seconds["dense"])
    base_flops = sequence_flops(model.config, counts, plans[0]).total
    print(f"{args.preset} on {args.device}, {args.dtype}, batch {args.batch}, {layout.kinds.shape[1]} tokens")
    print(f"{'plan':<10}{'ms':>10}{'of dense':>10}{'FLOPs':>10}")
    for plan in plans:
        median = statistics.median(seconds[plan.name])
        share = sequence_flops(model.config, counts, plan).total / base_flops
        print(f"{plan.name:<10}{1000 * median:>10.1f}{median / base_time:>10.3f}{share:>10.3f}")


if __name__ == "__main__":
    main()
