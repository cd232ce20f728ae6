"""How fast the hot paths run on an accelerator, in at most four minutes; without one, small sizes on the CPU.

    python benchmarks/device.py [--small]

Results are first compared with the CPU's, in float64 where the device has it. Then each operation is timed in turns
with the plain operation that bounds it. Ratios are of medians; the clock is read only after a step has finished.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers as hf
from torch import Tensor

from hf_erasure import ConceptErasureConfig, fit_concept_erasure
from hf_erasure.erasers import ConceptMoments, apply_erasure
from hf_erasure.gradiend import FeatureNeuron

hf.logging.set_verbosity_error()
warnings.simplefilter("ignore")

SECONDS = 240  # for the whole script; parts that would begin later are skipped, with a message
Cases = Mapping[str, Callable[[], object]]


class Device:
    """The device that everything runs on, and a clock that waits for it."""

    def __init__(self, *, small: bool) -> None:
        self.accelerator = None if small else torch.accelerator.current_accelerator()
        self.device = self.accelerator or torch.device("cpu")
        self.small = self.accelerator is None
        self.started = time.perf_counter()

    def wait(self) -> None:
        """Wait until all launched operations are done."""
        if self.accelerator is not None:
            torch.accelerator.synchronize()

    def medians(self, cases: Cases, repeats: int) -> dict[str, float]:
        """Median milliseconds of each case; all run in turns, and the first round does not count."""
        times: dict[str, list[float]] = {name: [] for name in cases}
        for turn in range(repeats + 1):
            for name, run in cases.items():
                self.wait()
                start = time.perf_counter()
                run()
                self.wait()
                if turn:
                    times[name].append((time.perf_counter() - start) * 1e3)
        return {name: statistics.median(found) for name, found in times.items()}

    def row(self, what: str, cases: Cases, repeats: int = 20) -> None:
        """Time cases relative to the first case, and print one line."""
        found = self.medians(cases, repeats)
        floor, *others = found.items()
        line = "  ".join(f"{name} {taken:.3f} ms = {taken / floor[1]:.2f} x" for name, taken in others)
        print(f"{what:<34} {floor[0]} {floor[1]:.3f} ms  {line}", flush=True)

    def has_time(self, what: str) -> bool:
        """Whether there is time to begin a part."""
        left = SECONDS - (time.perf_counter() - self.started)
        if left < 20:
            print(f"{what:<34} left out: {left:.0f} s of {SECONDS} are left", flush=True)
        return left >= 20


def rows_of(count: int, width: int) -> tuple[Tensor, Tensor]:
    """Float32 rows on the CPU whose classes differ, and the classes."""
    generator = torch.Generator().manual_seed(0)
    z = torch.arange(count) % 2
    x = torch.randn(count, width, generator=generator)
    return x + z[:, None] * torch.randn(width, generator=generator) * 0.3 + 0.5, z


def check(on: Device) -> None:
    """Compare moments, eraser and neuron on the device with those on the CPU."""
    x, z = rows_of(2048, 256)
    here, there = ConceptMoments(256, 2).update(x, z), ConceptMoments(256, 2).update(x.to(on.device), z.to(on.device))
    gaps = {"mean": (there.mean_x.cpu() - here.mean_x).abs().max()}
    gaps["covariance"] = (there.covariance_x.cpu() - here.covariance_x).abs().max() / here.covariance_x.abs().max()
    one, other = here.eraser(), there.eraser()
    gaps["eraser"] = (other.matrix.cpu() - one.matrix).abs().max()
    gaps["apply"] = (other(x.to(on.device)).cpu() - one(x)).abs().max()
    shapes = {"a": (64, 64), "b": (64,)}
    neurons = [FeatureNeuron(shapes, lr=1e-3, device=device) for device in ("cpu", on.device)]
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        source, target = ({n: torch.randn(s, generator=generator) for n, s in shapes.items()} for _ in range(2))
        for neuron in neurons:
            neuron.step(source, target)
    values = [neuron.encoder().encode(source) for neuron in neurons]
    gaps["neuron"] = torch.tensor(abs(values[0] - values[1]))
    for name, gap in gaps.items():
        # Products are float32, and maps are applied in float32.
        if not float(gap) < 1e-4:
            raise SystemExit(f"{name} on {on.device} is {float(gap):.1e} from that on the CPU: nothing is timed.")
    print("against the CPU: " + ", ".join(f"{name} {float(gap):.0e}" for name, gap in gaps.items()), flush=True)


def kernels(on: Device) -> None:
    """Time applying, updating and solving."""
    for width in (64, 256) if on.small else (768, 2048, 4096):
        x, z = (part.to(on.device) for part in rows_of(512 if on.small else 8192, width))
        moments, floor = ConceptMoments(width, 2).update(x, z), torch.zeros(width, width, device=on.device)
        on.row(
            f"update, width {width}",
            {"addmm_": lambda f=floor, x=x: f.addmm_(x.T, x), "ours": lambda m=moments, x=x, z=z: m.update(x, z)},
        )
        covariance = moments.covariance_x + torch.eye(width, device=on.device)
        on.row(
            f"solve, width {width}",
            {"cholesky": lambda c=covariance: torch.linalg.cholesky(c), "ours": moments.eraser},
            5,
        )
        for dtype in (torch.float32, torch.bfloat16):
            hidden, other = x.to(dtype), x.flip(0).to(dtype)
            parts = moments.eraser(rank=1).parts(on.device, torch.float32)
            cases: dict[str, Callable[[], object]] = {
                "sum": lambda h=hidden, o=other: torch.add(h, o),
                "eager": lambda h=hidden, p=parts: apply_erasure(h, *p),
            }
            if not on.small:
                compiled = torch.compile(apply_erasure)
                cases["compiled"] = lambda h=hidden, p=parts, c=compiled: c(h, *p)
            on.row(f"apply rank 1, {width}, {str(dtype).removeprefix('torch.')}", cases)


def model_of(on: Device) -> tuple[Any, list[dict[str, Tensor]]]:
    """A Llama of the 1B class in bfloat16, or a small one, and batches of it."""
    sizes = (64, 2, 128, 4, 1000) if on.small else (2048, 16, 8192, 32, 128256)
    width, layers, inner, heads, words = sizes
    config = hf.LlamaConfig(
        vocab_size=words, hidden_size=width, num_hidden_layers=layers, intermediate_size=inner,
        num_attention_heads=heads, num_key_value_heads=heads // 4, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    with on.device:
        model = hf.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    generator, batches = torch.Generator().manual_seed(0), []
    for _ in range(4):
        labels = torch.arange(4) % 2
        ids = torch.randint(10, 500, (4, 16 if on.small else 256), generator=generator) + labels[:, None] * 100
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "concept_labels": labels})
    return model, batches


def models(on: Device) -> None:
    """Time scrubbing (also with activations on disk), and two active adapters in a compiled model."""
    model, batches = model_of(on)
    for name in ("one", "two"):
        model.add_adapter(ConceptErasureConfig(labels=["a", "b"]), adapter_name=name)
    model.set_adapter("one")

    def plain() -> None:
        with torch.no_grad():
            for batch in batches:
                model.model(batch["input_ids"].to(on.device), attention_mask=batch["attention_mask"].to(on.device))

    def fit(name: str = "one", **options: Any) -> None:
        fit_concept_erasure(model, batches, name, progress=False, **options)

    cases: dict[str, Callable[[], object]] = {
        "plain pass": plain,
        "one pass": lambda: fit(sequential=False),
        "scrub": fit,
        "scrub, 1 resident": lambda: fit(resident_batches=1),
    }
    on.row("fitting a Llama in bfloat16", cases, 1 if on.small else 3)
    model.set_adapter("two")
    fit("two", sequential=False)
    model.set_adapter(["one", "two"])
    ids = batches[0]["input_ids"].to(on.device)
    with torch.no_grad():
        model.disable_adapters()
        before = on.medians({"plain": lambda: model.model(ids)}, 5)["plain"]
        model.enable_adapters()
        both = {"eager": lambda: model.model(ids)}
        if not on.small:
            compiled = torch.compile(model.model)
            both["compiled"] = lambda: compiled(ids)
        found = on.medians(both, 5)
    line = "  ".join(f"{name} {taken:.3f} ms = {taken / before:.2f} x" for name, taken in found.items())
    print(f"{'two adapters at once':<34} without {before:.3f} ms  {line}", flush=True)


def neuron(on: Device) -> None:
    """Time one step of GRADIEND, relative to a sum of two vectors of the same size."""
    for n in (10_000,) if on.small else (5_000_000, 100_000_000):
        generator = torch.Generator().manual_seed(0)
        source, target = ({"w": torch.randn(n, generator=generator).to(on.device)} for _ in range(2))
        ours = FeatureNeuron({"w": (n,)}, device=on.device)
        on.row(
            f"GRADIEND step, n = {n / 1e6:g} M",
            {
                "sum": lambda s=source, t=target: torch.add(s["w"], t["w"]),
                "ours": lambda o=ours, s=source, t=target: o.step(s, t),
            },
        )


def main() -> None:
    """Run all parts that there is time for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--small", action="store_true", help="small sizes on the CPU, also where there is an accelerator"
    )
    on = Device(small=parser.parse_args().small)
    name = torch.cuda.get_device_name() if on.device.type == "cuda" else str(on.device)
    print(f"torch {torch.__version__}, {name}{', small sizes' if on.small else ''}")
    for what, part in (("check", check), ("kernels", kernels), ("neuron", neuron), ("models", models)):
        if on.has_time(what):
            part(on)
    print(f"{time.perf_counter() - on.started:.0f} s in all")


if __name__ == "__main__":
    main()
