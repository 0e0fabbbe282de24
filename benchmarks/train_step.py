"""Whole training steps: our MoE, our dense model of equal active width, transformers' MoE and nanoGPT, in one run.

    python benchmarks/train_step.py [--quick] [--compile] [--nanogpt model.py] [--json FILE]

A step is forward, backward and fused AdamW on fresh random bytes. All models of a cell alternate in random order and get
the same share of the time; medians. Memory that a step frees is kept for the next one, as where the lab trains, for all of them
alike. `ratio` is the median over rounds of a model's time over mue-moe's of the same round.
transformers' model is Qwen3-MoE with every combination of its experts and attention implementations, so that its best is
among them. nanoGPT is read from a checkout of github.com/karpathy/nanoGPT; mue-gpt is our dense model in its shape (no
gate, 4 d wide), with RMSNorm, RoPE and QK-norm where it has LayerNorm and learned positions.
`--profile` prints the ten most expensive operations of our MoE's step instead.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import mue
from mue.kernels import library
from mue.lab.doctor.timing import measure, median_ratio, ratios
from mue.lab.models.language import LanguageModel
from mue.lab.train.provenance import provenance
from mue.moe import MoELayer
from mue.util.files import write_json
from mue.util.memory import keep_freed_memory

SHAPES = {  # notation, width, expert width, layers, tokens per step
    "small": ("16e4a", 128, 128, 4, 2048),
    "demo": ("16e4a1s", 128, 64, 4, 512),
    "d256": ("16e4a", 256, 128, 4, 2048),
}
LENGTH, VOCAB, HEAD = 128, 256, 32
Step = Callable[[Tensor], None]


def stepper(model: nn.Module, loss: Callable[[Tensor], Tensor], dtype: torch.dtype, groups: object = None) -> Step:
    """One optimizer step on a batch of tokens (B, T)."""
    optimizer = torch.optim.AdamW(groups or model.parameters(), lr=1e-3, fused=True)  # type: ignore[arg-type]

    def step(tokens: Tensor) -> None:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            value = loss(tokens)
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if isinstance(model, LanguageModel):
            model.end_step_(1e-3)

    return step


def ours(target: mue.MoE | mue.Dense, dtype: torch.dtype, compiled: bool, backend: str = "auto") -> Step:
    """The lab's model with a transferred plan."""
    plan = mue.transfer(
        mue.Dense(64, 64, 3, head_dim=HEAD), target, mue.HParams(lr=1e-3, weight_decay=0.1, init_std=0.1)
    )
    model = LanguageModel(plan.target, plan.multipliers)
    plan.init_(model)
    for module in model.modules():
        if isinstance(module, MoELayer):
            module.backend = backend
    call = torch.compile(model) if compiled else model
    return stepper(model, lambda tokens: call(tokens, tokens).loss, dtype, plan.param_groups(model))


def transformers_moe(target: mue.MoE, experts: str, attention: str, dtype: torch.dtype, compiled: bool) -> Step:
    """Qwen3-MoE of the same numbers."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    block = target.blocks[0]
    config = Qwen3MoeConfig(
        vocab_size=VOCAB, hidden_size=target.width, moe_intermediate_size=block.expert, num_hidden_layers=target.layers,
        num_attention_heads=target.num_heads, num_key_value_heads=target.num_kv_heads, head_dim=HEAD,
        num_experts=block.experts, num_experts_per_tok=block.active, norm_topk_prob=True, use_cache=False,
        attn_implementation=attention,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config)
    model.set_experts_implementation(experts)
    call = torch.compile(model) if compiled else model
    return stepper(model, lambda tokens: call(input_ids=tokens, labels=tokens).loss, dtype)


def nanogpt(path: Path, width: int, layers: int, manual: bool, dtype: torch.dtype, compiled: bool) -> Step:
    """nanoGPT's model as it is, or told that there is no fused attention."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module
    spec.loader.exec_module(module)
    config = module.GPTConfig(
        block_size=LENGTH, vocab_size=VOCAB, n_layer=layers, n_head=width // HEAD, n_embd=width, bias=False
    )
    model = module.GPT(config)
    if manual:
        for block in model.transformer.h:
            block.attn.flash = False
            block.attn.register_buffer("bias", torch.ones(LENGTH, LENGTH).tril()[None, None])
    call = torch.compile(model) if compiled else model
    return stepper(model, lambda tokens: call(tokens, tokens)[1], dtype)


def models(
    name: str, dtype: torch.dtype, compiled: bool, nanogpt_path: Path | None, skip: Sequence[str] = ()
) -> dict[str, Step]:
    """Everything that takes part in one cell."""
    notation, width, expert, layers, _ = SHAPES[name]
    moe = mue.MoE.parse(notation, width=width, expert=expert, layers=layers, head_dim=HEAD, sequence=LENGTH)
    dense = mue.Dense(width, moe.active_width, layers, head_dim=HEAD, sequence=LENGTH)
    builds: dict[str, Callable[[], Step]] = {
        "mue-moe": partial(ours, moe, dtype, compiled),
        "mue-dense": partial(ours, dense, dtype, compiled),
    }
    if library.loaded() is not None:
        builds["mue-moe-portable"] = partial(ours, moe, dtype, compiled, "portable")
    if not moe.blocks[0].shared_experts:  # Qwen3-MoE has none
        for experts in ("eager", "grouped_mm"):
            for attention in ("eager", "sdpa"):
                if not (compiled and experts == "eager"):  # a graph break for every expert
                    builds[f"transformers-{experts}-{attention}"] = partial(
                        transformers_moe, moe, experts, attention, dtype, compiled
                    )
    if nanogpt_path is not None and name == "small":
        gpt = mue.Dense(width, 4 * width, layers, head_dim=HEAD, sequence=LENGTH, gated=False)
        builds["mue-gpt"] = partial(ours, gpt, dtype, compiled)
        builds["nanogpt"] = partial(nanogpt, nanogpt_path, width, layers, False, dtype, compiled)
        builds["nanogpt-manual"] = partial(nanogpt, nanogpt_path, width, layers, True, dtype, compiled)
    return {impl: build() for impl, build in builds.items() if impl not in skip}


def batches(name: str, seed: int) -> Callable[[], Tensor]:
    """Fresh random bytes of the shape's size."""
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randint(VOCAB, (SHAPES[name][-1] // LENGTH, LENGTH), generator=generator)


def cell(
    name: str, dtype: torch.dtype, compiled: bool, nanogpt_path: Path | None, skip: Sequence[str], seconds: float
) -> list[dict[str, object]]:
    """One cell's rows, printed as they come."""
    times = measure(models(name, dtype, compiled, nanogpt_path, skip), batches(name, 0), seconds)
    rows: list[dict[str, object]] = []
    for impl, took in times.items():
        paired = ratios(took, times["mue-moe"])
        quarter, ms = len(paired) // 4, statistics.median(took)
        rows.append(
            {
                "impl": impl, "shape": name, "tokens": SHAPES[name][-1], "dtype": str(dtype).removeprefix("torch."),
                "compiled": compiled, "threads": torch.get_num_threads(), "ms": round(ms, 2),
                "tokens_per_second": round(1e3 * SHAPES[name][-1] / ms), "ratio": round(median_ratio(took, times["mue-moe"]), 3),
                "ratio_quartiles": [round(paired[quarter], 3), round(paired[-1 - quarter], 3)], "rounds": len(took),
            }
        )  # fmt: skip
        print(
            " ".join(f"{rows[-1][key]!s:>12}" for key in ("shape", "dtype", "threads", "ms", "ratio")),
            f" {impl}",
            flush=True,
        )
    return rows


def profile(name: str, dtype: torch.dtype, compiled: bool) -> None:
    """The ten operations of our MoE's step that take most of the processor's time."""
    step, batch = models(name, dtype, compiled, None, [])["mue-moe"], batches(name, 0)
    for _ in range(5):  # compiling, first touches and the optimizer's state are no part of a step
        step(batch())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        for _ in range(10):
            step(batch())
    events = sorted(found.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    print(f"{name} {dtype}: {total / 1e4:.1f} ms a step")
    for event in events[:10]:
        print(
            f"{event.key:<60} {event.self_cpu_time_total / 1e4:8.2f} ms {100 * event.self_cpu_time_total / total:5.1f} % {event.count // 10:5d} calls"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="end within a minute: the first shape, few rounds")
    parser.add_argument("--compile", action="store_true", help="under torch.compile (compiling takes minutes)")
    parser.add_argument("--profile", action="store_true", help="print the ten most expensive operations and end")
    parser.add_argument("--nanogpt", type=Path, metavar="FILE", help="model.py of a nanoGPT checkout")
    parser.add_argument("--skip", nargs="*", default=[], metavar="IMPL", help="leave out implementations (not mue-moe)")
    parser.add_argument("--shape", choices=list(SHAPES), help="only this one")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="only this one")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each cell")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows and the machine here")
    options = parser.parse_args()
    keep_freed_memory()
    torch.manual_seed(0)
    random.seed(0)
    dtypes = [torch.float32, torch.bfloat16] if options.dtype is None else [getattr(torch, options.dtype)]
    rows: list[dict[str, object]] = []
    for name in [options.shape] if options.shape else (["small"] if options.quick else list(SHAPES)):
        for dtype in dtypes:
            if options.profile:
                profile(name, dtype, options.compile)
                continue
            seconds = 10.0 if options.quick else options.seconds
            rows += cell(name, dtype, options.compile, options.nanogpt, options.skip, seconds)
    if options.json:
        write_json(options.json, {"command": " ".join(["python", *sys.argv]), **provenance(), "rows": rows})


if __name__ == "__main__":
    main()
