"""What fitting and applying erasures costs beside a plain forward pass.

    python benchmarks/scrubbing.py [--quick] [--threads 2]

Everything that is compared runs in turns within one process on the same data; ratios of medians are printed, since
times of different runs say little about each other.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

import hf_erasure  # noqa: F401  registers the adapter type
from hf_erasure import ConceptErasureConfig, fit_concept_erasure
from hf_erasure.adapters import erasure_layers
from hf_erasure.erasers import ConceptMoments, Eraser
from hf_erasure.fitting.scrubbing import Scrubber

hf.logging.set_verbosity_error()

VOCABULARY, LAYERS = 1000, 6


def build(kind: str, width: int) -> nn.Module:
    """A model of six layers with random weights."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": width, "num_hidden_layers": LAYERS, "num_attention_heads": width // 64,
        "intermediate_size": 4 * width,
    }  # fmt: skip
    torch.manual_seed(0)
    if kind == "llama":
        return hf.LlamaModel(hf.LlamaConfig(**sizes)).eval()
    if kind == "bert":
        return hf.BertModel(hf.BertConfig(**sizes)).eval()
    config = hf.T5Config(
        vocab_size=VOCABULARY, d_model=width, d_kv=64, num_heads=width // 64, d_ff=4 * width, num_layers=LAYERS
    )
    return hf.T5Model(config).eval()


def make_batches(kind: str, count: int, rows: int = 8, length: int = 128) -> list[dict[str, Tensor]]:
    """Token ids whose range gives the class away."""
    generator, batches = torch.Generator().manual_seed(0), []
    for _ in range(count):
        labels = torch.arange(rows) % 2
        ids = torch.randint(1, VOCABULARY // 2, (rows, length), generator=generator) + labels[:, None] * 100
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "concept_labels": labels}
        if kind == "t5":
            batch |= {"decoder_input_ids": ids, "decoder_attention_mask": torch.ones_like(ids)}
        batches.append(batch)
    return batches


@contextmanager
def one_site_a_pass() -> Iterator[None]:
    """The naive procedure: the fallback that the scrubber has for shared layers."""
    original = Scrubber._side_by_side

    def refuse(self: Scrubber, shown: Any) -> bool:
        hf.logging.set_verbosity_error()
        self.fits.clear()
        return False

    Scrubber._side_by_side = refuse  # type: ignore[method-assign]
    try:
        yield
    finally:
        Scrubber._side_by_side = original  # type: ignore[method-assign]


def in_turns(steps: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each step, all run in turns."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken[1:]) for name, taken in times.items()}


def fitting(kind: str, width: int, count: int, repeats: int) -> dict[str, Any]:
    """Plain pass, moment products alone, and the three ways of fitting."""
    model, batches = build(kind, width), make_batches(kind, count)
    adapted = copy.deepcopy(model)
    adapted.add_adapter(ConceptErasureConfig(labels=["a", "b"]), adapter_name="a")
    sites = len(erasure_layers(adapted))
    states = [torch.randn(b["input_ids"].numel(), width) for b in batches]
    labels = [b["concept_labels"].repeat_interleave(b["input_ids"].shape[1]) for b in batches]

    def plain() -> None:
        with torch.no_grad():
            for batch in batches:
                model(**{k: v for k, v in batch.items() if k != "concept_labels"})

    def products() -> None:
        for _ in range(sites):
            moments = ConceptMoments(width, 2)
            for x, z in zip(states, labels, strict=True):
                moments.update(x, z)
            moments.eraser(rank=1)

    def fit(**options: Any) -> None:
        fit_concept_erasure(adapted, batches, "a", progress=False, **options)

    def naive() -> None:
        with one_site_a_pass():
            fit()

    steps = {
        "plain": plain,
        "moments": products,
        "one pass": lambda: fit(sequential=False),
        "sequential": fit,
        "naive": naive,
    }
    return {"model": f"{kind} {width}", "sites": sites, **in_turns(steps, repeats)}


def report_fitting(cases: list[tuple[str, int, int]], repeats: int) -> None:
    """Print the table of ratios."""
    print("\nFitting: seconds of the plain pass; the rest as multiples of it")
    head = ("model", "sites", "plain s", "moments", "one pass", "sequential", "limit", "naive", "naive / sequential")
    print("  ".join(f"{h:>11}" for h in head))
    for kind, width, count in cases:
        found = fitting(kind, width, count, repeats)
        plain, moments = found["plain"], found["moments"]
        cells = [
            found["model"], found["sites"], f"{plain:.2f}", f"{moments / plain:.2f}",
            f"{found['one pass'] / plain:.2f}",
            f"{found['sequential'] / plain:.2f}", f"{3 + moments / plain:.2f}", f"{found['naive'] / plain:.2f}",
            f"{found['naive'] / found['sequential']:.2f}",
        ]  # fmt: skip
        print("  ".join(f"{c!s:>11}" for c in cells), flush=True)
    print("limit: three plain passes and the bare cost of the moments")


def report_applying(repeats: int) -> None:
    """Print what rank-1 erasers at every norm add to a forward pass."""
    print("\nApplying: rank-1 erasers at every norm, (8, 512) tokens, width 768, 6 layers")
    for kind in ("bert", "llama"):
        model = build(kind, 768)
        batch = make_batches(kind, 1, 8, 512)[0]
        inputs = {k: v for k, v in batch.items() if k != "concept_labels"}
        adapted = copy.deepcopy(model)
        adapted.add_adapter(ConceptErasureConfig(labels=["a", "b"]), adapter_name="a")
        direction = torch.randn(768, 1, dtype=torch.float64)
        direction /= direction.norm()
        eraser = Eraser(left=direction, right=direction.T.contiguous(), bias=torch.zeros(768, dtype=torch.float64))
        for layer in erasure_layers(adapted).values():
            layer.set_eraser("a", eraser, torch.float32)

        def run(which: nn.Module, inputs: dict[str, Tensor] = inputs) -> None:
            with torch.no_grad():
                which(**inputs)

        found = in_turns(
            {"plain": lambda m=model: run(m), "erased": lambda m=adapted: run(m), "again": lambda m=model: run(m)},
            repeats,
        )
        noise = abs(found["again"] / found["plain"] - 1)
        print(
            f"{kind:>6}: {found['erased'] / found['plain'] - 1:+.1%} (two plain passes differ by {noise:.1%})",
            flush=True,
        )


def peak(resident: int | None, count: int) -> float:
    """Peak memory of a fit in MB above the model, in a process of its own."""
    script = f"""
import sys, resource; sys.path.insert(0, {str(sys.path[0])!r})
import scrubbing as b, torch
torch.set_num_threads(2)
model, batches = b.build("bert", 768), b.make_batches("bert", {count}, 8, 256)
model.add_adapter(b.ConceptErasureConfig(labels=["a", "b"], layers_to_transform=[0, 1, 2]), adapter_name="a")
with torch.no_grad():
    model(**{{k: v for k, v in batches[0].items() if k != "concept_labels"}})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
b.fit_concept_erasure(model, batches, "a", progress=False, resident_batches={resident})
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return float(run.stdout.split()[-1])


def report_memory(count: int) -> None:
    """Print peak memory against the number of resident batches."""
    print(
        f"\nMemory: peak of a sequential fit above the model and one forward pass, MB; {count} batches of 8 x 256, "
        "BERT 768"
    )
    for resident in (None, 8, 4, 2, 1):
        print(f"  resident_batches={resident!s:>4}: {peak(resident, count):7.0f}", flush=True)


def main() -> None:
    """Run everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    repeats = 1 if options.quick else 3
    cases = [("llama", 256, 8), ("bert", 256, 8), ("t5", 256, 8), ("bert", 768, 4)]
    report_fitting(cases[:2] if options.quick else cases, repeats)
    report_applying(5 if options.quick else 15)
    report_memory(8 if options.quick else 16)


if __name__ == "__main__":
    main()
