"""What fitting and applying erasures costs, compared with a plain forward pass.

    python benchmarks/scrubbing.py [--quick] [--threads 1]

Times of different runs cannot be compared. So everything that is compared runs in turns within one process on the same
data, and every figure is a ratio to the plain passes right before and after. Processor time is counted, by default of
one thread: unlike elapsed time, it does not grow when other programs use the processor too.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
import transformers as hf
from torch import Tensor, nn

import hf_erasure  # noqa: F401  registers the adapter type
from hf_erasure import ConceptErasureConfig, fit_concept_erasure
from hf_erasure.adapters import erasure_layers
from hf_erasure.erasers import ConceptMoments, Eraser
from hf_erasure.fitting.forward_passes import OutOfStep
from hf_erasure.fitting.scrubbing import Scrubber

hf.logging.set_verbosity_error()

VOCABULARY, LAYERS = 1000, 6
# An encoder-decoder has two stacks of six layers.
FITTING = [("llama", 256, 8), ("bert", 256, 8), ("t5", 256, 2), ("bert", 768, 2)]
RESIDENT = (None, 8, 4, 2, 1)


# ---- models and data -------------------------------------------------------------------------------------------------


def build(kind: str, width: int, layers: int = LAYERS) -> Any:
    """A model with random weights that, as in fitting, does not keep keys and values for generating."""
    torch.manual_seed(0)
    if kind == "t5":
        config = hf.T5Config(
            vocab_size=VOCABULARY, d_model=width, d_kv=64, num_heads=width // 64, d_ff=4 * width, num_layers=layers,
            use_cache=False,
        )  # fmt: skip
        return hf.T5Model(config).eval()
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": width // 64,
        "intermediate_size": 4 * width, "use_cache": False,
    }  # fmt: skip
    if kind == "bert":
        return hf.BertModel(hf.BertConfig(**sizes)).eval()
    if kind == "llama":
        return hf.LlamaModel(hf.LlamaConfig(**sizes)).eval()
    return hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, tie_word_embeddings=False)).eval()


def make_batches(kind: str, count: int, rows: int = 8, length: int = 128) -> list[dict[str, Tensor]]:
    """Token ids whose range shows the class."""
    generator, batches = torch.Generator().manual_seed(0), []
    for _ in range(count):
        labels = torch.arange(rows) % 2
        ids = torch.randint(1, VOCABULARY // 2, (rows, length), generator=generator) + labels[:, None] * 100
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "concept_labels": labels}
        if kind == "t5":
            batch |= {"decoder_input_ids": ids, "decoder_attention_mask": torch.ones_like(ids)}
        batches.append(batch)
    return batches


def inputs_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The entries of a batch that the model takes."""
    return {name: value for name, value in batch.items() if name != "concept_labels"}


# ---- fitting ---------------------------------------------------------------------------------------------------------


@contextmanager
def one_site_a_pass() -> Iterator[None]:
    """The naive procedure, which the scrubber uses only for shared layers."""
    original = Scrubber._side_by_side

    def refuse(self: Scrubber, shown: Any) -> None:
        hf.logging.set_verbosity_error()
        raise OutOfStep("This is not side by side.")

    Scrubber._side_by_side = refuse  # type: ignore[method-assign]
    try:
        yield
    finally:
        Scrubber._side_by_side = original  # type: ignore[method-assign]


def seconds(step: Callable[[], object]) -> float:
    """Processor time of a step, in seconds."""
    start = time.process_time()
    step()
    return time.process_time() - start


def beside(
    plain: Callable[[], object], steps: Mapping[str, Callable[[], object]], repeats: int, once: Collection[str] = ()
) -> tuple[float, dict[str, float]]:
    """Time steps relative to a plain step that runs before and after each.

    Args:
        plain: The step that the others are compared with.
        steps: Name → step.
        repeats: Number of rounds.
        once: The steps that run in the last round only.

    Returns:
        Median seconds of the plain step, and of each other step the median over rounds of its ratio to the mean of its
        two neighbours.
    """
    ratios: dict[str, list[float]] = {name: [] for name in steps}
    plains = []
    plain()
    before = seconds(plain)
    for turn in range(repeats):
        for name, step in steps.items():
            if name in once and turn < repeats - 1:
                continue
            taken, after = seconds(step), seconds(plain)
            ratios[name].append(2 * taken / (before + after))
            plains.append(after)
            before = after
    return statistics.median(plains), {name: statistics.median(found) for name, found in ratios.items()}


def fitting(kind: str, width: int, count: int, repeats: int) -> tuple[int, float, dict[str, float]]:
    """Number of sites, seconds of a plain pass, and its multiples for the moments alone and the ways of fitting."""
    model, batches = build(kind, width), make_batches(kind, count)
    adapted = copy.deepcopy(model)
    adapted.add_adapter(ConceptErasureConfig(labels=["a", "b"]), adapter_name="gender")
    sites = len(erasure_layers(adapted))
    states = [torch.randn(b["input_ids"].numel(), width) for b in batches]
    labels = [b["concept_labels"].repeat_interleave(b["input_ids"].shape[1]) for b in batches]

    def plain() -> None:
        with torch.no_grad():
            for batch in batches:
                model(**inputs_of(batch))

    def products() -> None:
        for _ in range(sites):
            moments = ConceptMoments(width, 2)
            for x, z in zip(states, labels, strict=True):
                moments.update(x, z)
            moments.eraser(rank=1)

    def fit(**options: Any) -> None:
        fit_concept_erasure(adapted, batches, "gender", progress=False, **options)

    def naive() -> None:
        with one_site_a_pass():
            fit()

    steps = {"moments": products, "one pass": lambda: fit(sequential=False), "sequential": fit, "naive": naive}
    return sites, *beside(plain, steps, repeats, once={"naive"})


def report_fitting(cases: list[tuple[str, int, int]], repeats: int) -> None:
    """Print the table of ratios."""
    print(f"\nFitting: seconds of a plain pass over the batches (8 x 128 tokens each), {LAYERS} layers; the rest as")
    print(f"its multiples. Medians of {repeats} round(s) of neighbours; naive (one site a pass) ran once.")
    head = ("model", "batches", "sites", "plain s", "moments", "one pass", "sequential", "limit", "naive", "naive/seq.")
    print("  ".join(f"{h:>10}" for h in head))
    for kind, width, count in cases:
        sites, plain, found = fitting(kind, width, count, repeats)
        limit, gain = 3 + found["moments"], found["naive"] / found["sequential"]
        ratios = [found["moments"], found["one pass"], found["sequential"], limit, found["naive"], gain]
        missed = "  over the limit" if found["sequential"] > limit else ""
        missed += "  below 3 x" if gain < 3 else ""
        cells = [f"{kind} {width}", count, sites, f"{plain:.2f}", *(f"{r:.2f}" for r in ratios)]
        print("  ".join(f"{c!s:>10}" for c in cells) + missed, flush=True)
    print("limit: three plain passes and the bare cost of the moments")


# ---- applying --------------------------------------------------------------------------------------------------------


def with_erasers(model: nn.Module, *, merged: bool = False) -> nn.Module:
    """A copy with a linear rank-1 eraser at every norm.

    Raises:
        ValueError: If they should be merged but cannot be.
    """
    config = ConceptErasureConfig(labels=["a", "b"], affine=False)
    wrapped = peft.get_peft_model(copy.deepcopy(model), config, adapter_name="gender")
    layers = erasure_layers(wrapped)
    for seed, layer in enumerate(layers.values()):
        direction = torch.randn(768, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        direction /= direction.norm()
        eraser = Eraser(left=direction, right=direction.T.contiguous(), bias=None)
        layer.set_eraser("gender", eraser, torch.float32)
    return (wrapped.merge_and_unload() if merged else wrapped.get_base_model()).eval()


def laps(model: nn.Module, inputs: dict[str, Tensor]) -> list[float]:
    """Seconds of a forward pass, from block to block."""
    blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == LAYERS)
    times: list[float] = []
    hooks = [block.register_forward_pre_hook(lambda *_: times.append(time.process_time())) for block in blocks]
    try:
        with torch.no_grad():
            times.append(time.process_time())
            model(**inputs)
            times.append(time.process_time())
    finally:
        for hook in hooks:
            hook.remove()
    return [end - start for start, end in itertools.pairwise(times)]


def fastest(passes: Sequence[list[float]]) -> float:
    """Sum of the fastest time of each lap over all passes: short laps find quiet moments, whole passes do not."""
    return sum(min(lap) for lap in zip(*passes, strict=True))


def overhead(passes: dict[str, list[list[float]]], name: str) -> str:
    """How much a variant adds to a plain pass: by the fastest laps, and by the median of laps over their neighbours."""
    plain = (fastest(passes["plain"]) + fastest(passes["again"])) / 2
    rounds = zip(passes[name], passes["plain"], passes["again"], strict=True)
    # The first lap is the embedding: nothing is erased there, and it is too short to time.
    pairs = [2 * x / (p + q) for these in rounds for x, p, q in list(zip(*these, strict=True))[1:]]
    return f"{fastest(passes[name]) / plain - 1:+.1%} fastest, {statistics.median(pairs) - 1:+.1%} median"


def in_turns(steps: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The least seconds of each step, all run in turns."""
    rounds = [{name: seconds(step) for name, step in steps.items()} for _ in range(repeats)]
    return {name: min(taken[name] for taken in rounds) for name in steps}


def hooks_alone(adapted: nn.Module, repeats: int) -> tuple[int, dict[str, float]]:
    """Time the hooks of all sites on one activation without the model, and as many elementwise sums."""
    layers = list(erasure_layers(adapted).values())
    hidden, other = torch.randn(2, 8, 512, 768)

    def hooks() -> None:
        for layer in layers:
            layer._erase_output(layer.host, (), hidden)

    def sums() -> None:
        for _ in layers:
            torch.add(hidden, other)

    with torch.no_grad():
        return len(layers), in_turns({"hooks": hooks, "sums": sums}, repeats)


def report_applying(repeats: int) -> None:
    """Print what rank-1 erasers at every norm add to a forward pass, before and after merging."""
    print("\nApplying: rank-1 erasers at every norm, (8, 512) tokens, width 768, 6 layers. Targets: 2 %, merged 0.")
    print(f"Of {repeats} rounds (plain, erased, merged, plain; then backwards), every layer timed by itself: the sum")
    print("of its fastest runs, and the median of its ratio to the plain runs of the same round.")
    for kind in ("bert", "llama with head"):
        model = build(kind, 768)
        inputs = inputs_of(make_batches(kind, 1, 8, 512)[0])
        variants, refusal = {"plain": model, "erased": with_erasers(model)}, ""
        try:
            variants["merged"] = with_erasers(model, merged=True)
        except ValueError as error:
            refusal = str(error)
        variants["again"] = model
        passes: dict[str, list[list[float]]] = {name: [] for name in variants}
        for turn in range(repeats + 1):
            for name in list(variants) if turn % 2 else reversed(variants):
                found = laps(variants[name], inputs)
                if turn:
                    passes[name].append(found)
        plain = fastest(passes["plain"])
        sites, alone = hooks_alone(variants["erased"], 10 * repeats)
        print(f"{kind}: plain {plain:.2f} s; the second plain pass {overhead(passes, 'again')}")
        print(f"  erased: {overhead(passes, 'erased')}")
        print(
            f"  hooks alone: {alone['hooks'] / plain:.2%} of the plain pass ({sites} sites, {alone['hooks'] * 1e3:.0f} "
            f"ms); as many elementwise sums: {alone['sums'] / plain:.2%} ({alone['sums'] * 1e3:.0f} ms)"
        )
        if refusal:
            print(f"  merged: refused, as it should be: {refusal.partition('. ')[0]}", flush=True)
        else:
            print(f"  merged: {overhead(passes, 'merged')}; {likeness(model, variants['merged'])}", flush=True)


def likeness(model: nn.Module, merged: nn.Module) -> str:
    """Whether two models compute with the same modules and shapes."""

    def shape(of: nn.Module) -> list[Any]:
        tensors = [(name, value.shape) for name, value in of.state_dict().items()]
        return [*tensors, *((n, type(m), len(m._forward_hooks)) for n, m in of.named_modules())]

    return "same modules and shapes as plain" if shape(model) == shape(merged) else "NOT the modules of plain"


# ---- memory ----------------------------------------------------------------------------------------------------------


def high_water() -> float:
    """Peak memory of this process in MB; `getrusage` would also count the process that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def peak(resident: int | None, count: int) -> tuple[float, float]:
    """Peak memory of a fit in MB above the model, and its processor time, measured in a separate process."""
    script = f"""
import sys, time; sys.path.insert(0, {str(sys.path[0])!r})
import scrubbing as b, torch
torch.set_num_threads({torch.get_num_threads()})
model, batches = b.build("bert", 768, layers=2), b.make_batches("bert", {count}, 4, 256)
model.add_adapter(b.ConceptErasureConfig(labels=["a", "b"]), adapter_name="gender")
with torch.no_grad():
    model(**b.inputs_of(batches[0]))
before, start = b.high_water(), time.process_time()
b.fit_concept_erasure(model, batches, "gender", progress=False, resident_batches={resident})
print(b.high_water() - before, time.process_time() - start)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    memory, taken = run.stdout.split()[-2:]
    return float(memory), float(taken)


def report_memory(residents: Sequence[int | None], count: int) -> None:
    """Print peak memory against the number of resident batches."""
    print("\nMemory: peak of a sequential fit above the model and one forward pass; BERT 768, 2 layers,")
    print(f"{count} batches of 4 x 256 tokens (an activation: 3.1 MB), each in a process of its own.")
    print(f"  {'resident_batches':>16}  {'peak':>9}  {'taken':>8}")
    for resident in residents:
        memory, taken = peak(resident, count)
        print(f"  {resident!s:>16}  {memory:6.0f} MB  {taken:6.1f} s", flush=True)


def main() -> None:
    """Run everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} thread(s), CPU, float32; processor time")
    started = time.perf_counter()
    report_fitting(FITTING[:2] if options.quick else FITTING, 1 if options.quick else 3)
    report_applying(2 if options.quick else 4)
    report_memory(RESIDENT[:: 4 if options.quick else 1], 12)
    print(f"\n{(time.perf_counter() - started) / 60:.0f} minutes in all")


if __name__ == "__main__":
    main()
