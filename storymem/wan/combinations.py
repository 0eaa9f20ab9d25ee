"""Which settings of model, sampler and runtime go together, and why others do not. Loads no torch."""

from __future__ import annotations

from storymem.wan.settings import ModelSettings, RuntimeSettings, SamplerSettings


def check_reach(model: ModelSettings, memory_frames: int, name: str) -> None:
    """Raise ``ValueError`` if memory frames are beyond the transformer's temporal positions.

    Args:
        name: of the setting that gives their number.
    """
    most = (model.network.positions - 1) // model.rope_stride
    if memory_frames > most:
        raise ValueError(
            f"{name}={memory_frames}: with model.rope_stride={model.rope_stride} {model.name} can recall at most "
            f"{most} frames; write fewer, or a smaller stride"
        )


def check_combinations(
    model: ModelSettings,
    sampler: SamplerSettings,
    runtime: RuntimeSettings,
    *,
    processes: int | None = None,
    shares_attention: bool = False,
) -> None:
    """Raise ``ValueError`` for settings that contradict each other or have no effect together.

    Args:
        processes: how many generate a film; None: not known yet.
        shares_attention: whether shots of a batch read each other, in other layers at each step, as in StoryDiffusion.
    """
    blocks, cached = model.network.transformer["num_layers"], model.memory_attention == "cached"
    halves, cache = runtime.guidance_parallel, runtime.cache
    hidden = "sampler.negative_sees_memory=false hides the memory from one pass of guidance, and"
    rules = {
        f"{hidden} with memory_attention=joint that pass needs what the other predicts, which "
        "runtime.guidance_parallel computes elsewhere: set it to false": (
            halves and not sampler.negative_sees_memory and not cached
        ),
        "runtime.cache=first_block does not combine with runtime.context_parallel: processes see different tokens and "
        "would skip different steps; use runtime.cache=taylor": (
            cache == "first_block" and runtime.context_parallel != "none"
        ),
        f"runtime.cache=first_block skips all blocks but the first, and the networks of {model.name} have only one: "
        "use runtime.cache=none": cache == "first_block" and blocks < 2,
        f"runtime.cache={cache} skips steps that resemble the one before; the {sampler.steps} steps of a "
        "step-distilled sampler do not: use runtime.cache=none": cache != "none" and bool(sampler.adapter),
        f"runtime.memory_cache={runtime.memory_cache} is for model.memory_attention=cached: with joint nothing of the "
        "memory is cached": runtime.memory_cache != "device" and not cached,
        "runtime.precision=fp8_storage is not compiled: use runtime.precision=as_is or runtime.compile=none": (
            runtime.precision == "fp8_storage" and runtime.compile != "none"
        ),
        "runtime.experts=in_turn loads an expert twice a shot, and runtime.compile=blocks would compile it each time: "
        "use one of them": runtime.experts == "in_turn" and runtime.compile != "none",
        "runtime.experts=in_turn loads one expert at a time, and a learned recall reads both: use another memory, or "
        "runtime.experts=together": runtime.experts == "in_turn" and bool(model.adapter and model.adapter.query),
        "storydiffusion changes attention between steps: write runtime.compile=none": (
            shares_attention and runtime.compile != "none"
        ),
        f"storydiffusion changes attention between steps, some of which runtime.cache={cache} skips: write "
        "runtime.cache=none": shares_attention and cache != "none",
        "storydiffusion changes the attention of both experts, and one is loaded at a time (runtime.experts=in_turn): "
        "use a runtime with room for both (runtime.precision, runtime.offload)": (
            shares_attention and runtime.experts == "in_turn"
        ),
    }
    for name in ("context_parallel", "guidance_parallel", "shard_weights"):
        value = getattr(runtime, name)
        rules[
            f"runtime.{name}={str(value).lower()} shares a film among several processes and there is one: start it "
            "with torchrun --nproc_per_node=N scripts/generate.py ..., or use another runtime"
        ] = processes == 1 and value not in (False, "none")
    if processes is not None and processes > 1:
        rules |= _rules_for_several(model, sampler, runtime, processes)
    if broken := next((message for message, applies in rules.items() if applies), None):
        raise ValueError(broken)


def _rules_for_several(
    model: ModelSettings, sampler: SamplerSettings, runtime: RuntimeSettings, processes: int
) -> dict[str, bool]:
    """What several processes cannot do: message -> whether the settings ask for it."""
    method, halves, sharded = runtime.context_parallel, runtime.guidance_parallel, runtime.shard_weights
    heads, context = model.network.transformer["num_attention_heads"], processes // (2 if halves else 1)
    fitting = ", ".join(str(n) for n in range(2, heads + 1) if heads % n == 0)
    twice = ", each twice for guidance_parallel" if halves else ""
    rules = {
        f"{processes} processes were started and nothing specifies how they share the film: write runtime=multi-gpu, "
        "or runtime.context_parallel=ulysses, or runtime.guidance_parallel=true": method == "none" and not halves,
        f"runtime.guidance_parallel=true needs two equal halves, and {processes} processes were started: start one "
        "more or less, or set it to false": halves and processes % 2 == 1,
        f"runtime.guidance_parallel=true alone has work for 2 processes and {processes} were started: add "
        "runtime.context_parallel=ulysses": halves and method == "none" and processes > 2,
        "runtime.guidance_parallel=true, but sampler.guidance=1 runs no second pass: set it to false and leave all "
        "processes to runtime.context_parallel": halves and sampler.guidance == 1,
        f"runtime.offload={runtime.offload} does not combine with several processes; where the weights do not fit "
        "write runtime.offload=none runtime.shard_weights=true": runtime.offload not in ("none", "auto"),
        "runtime.experts=in_turn does not combine with several processes; where the weights do not fit write "
        "runtime.shard_weights=true": runtime.experts == "in_turn",
        "runtime.cache=first_block skips a step in one pass and not in the other, and processes that share weights "
        "must gather them at the same time: write runtime.cache=taylor or none": (
            runtime.cache == "first_block" and sharded
        ),
        f"runtime.context_parallel=ulysses gives each of {context} processes equally many of the model's {heads} "
        f"attention heads: start as many processes as divide them ({fitting}{twice}), or use ring": (
            method == "ulysses" and heads % context != 0
        ),
        "runtime.context_parallel=ring joins parts of attention by their log-sum-exp, which torch's native attention "
        "does not return: write runtime.attention=cudnn, flash2 or sage, or runtime.context_parallel=ulysses": (
            method == "ring" and context > 1 and (runtime.attention == "native" or runtime.device == "cpu")
        ),
        "runtime.attention=flash3 is not among the kernels that diffusers runs with runtime.context_parallel: write "
        "runtime.attention=auto, flash2, cudnn or sage": (
            method != "none" and context > 1 and runtime.attention == "flash3"
        ),
    }
    for name, plain in (("precision", "as_is"), ("compile", "none")):
        value = getattr(runtime, name)
        rules[
            f"runtime.{name}={value} does not combine with runtime.shard_weights=true: write runtime.{name}={plain}, "
            "or leave the weights whole"
        ] = sharded and value != plain
    return rules
