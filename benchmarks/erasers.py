"""How fast the erasers are, compared with concept-erasure 0.2.4 and with what the hardware allows.

    python benchmarks/erasers.py [--quick] [--threads N]

Everything that is compared runs interleaved, on the same data, in one process; figures are medians. A ratio above 1
means that we are faster than what it names. One thread by default: on a shared machine two threads wait for each other.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from concept_erasure import LeaceEraser, LeaceFitter
from torch import Tensor
from torch.nn.functional import one_hot

from hf_erasure.erasers import ConceptMoments, Eraser, apply_erasure

ROWS = 2048


def interleaved(candidates: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of every candidate; each round runs all of them once."""
    for run in candidates.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def activations(rows: int, width: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Float32 rows with correlated features, a few of them large, and the class of each row."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randint(classes, (rows,), generator=generator)
    shared = torch.randn(rows, 64, generator=generator) @ torch.randn(64, width, generator=generator) / 8
    x = shared + torch.randn(rows, width, generator=generator)
    x += torch.randn(classes, width, generator=generator)[z] * 0.3
    x[:, ::100] *= 20
    return x + 0.5, z


def bench_update(width: int, classes: int, repeats: int) -> str:
    x, z = activations(ROWS, width, classes)
    labels = one_hot(z, classes).float()
    floor = torch.zeros(width, width)
    ours = ConceptMoments(width, classes)
    peer = LeaceFitter(width, classes, dtype=torch.float32)
    seconds = interleaved(
        {
            "floor": lambda: floor.addmm_(x.T, x),
            "peer": lambda: peer.update(x, labels),
            "ours": lambda: ours.update(x, z),
        },
        repeats,
    )
    rate = ROWS / seconds["ours"]
    return (
        f"{width:>6} {classes:>4} {rate:>12,.0f} {seconds['floor'] / seconds['ours']:>10.2f} "
        f"{seconds['floor'] / seconds['peer']:>12.2f} {seconds['peer'] / seconds['ours']:>10.2f}"
    )


def residual(x: Tensor, z: Tensor, classes: int, left: Tensor, right: Tensor, bias: Tensor | None) -> float:
    """Largest correlation of a feature with a class after erasure, all in float64."""
    erased = apply_erasure(x.double(), left.double(), right.double(), None if bias is None else bias.double())
    labels = one_hot(z, classes).double()
    cross = (erased - erased.mean(0)).T @ (labels - labels.mean(0)) / x.shape[0]
    return float((cross.abs() / erased.std(0)[:, None] / labels.std(0)).max())


def bench_solve(width: int, classes: int, repeats: int) -> str:
    """Time the solve against the reference with float32 statistics (its default for float32 rows) and with float64."""
    x, z = activations(width + 1024, width, classes)
    ours = ConceptMoments(width, classes)
    peers = {dtype: LeaceFitter(width, classes, dtype=dtype) for dtype in (torch.float32, torch.float64)}
    for part, ids in zip(x.split(ROWS), z.split(ROWS), strict=True):
        ours.update(part, ids)
        for peer in peers.values():
            peer.update(part, one_hot(ids, classes).float())
    mine, took = ours.eraser(), {}
    figures = [residual(x, z, classes, mine.left, mine.right, mine.bias)]
    candidates: dict[str, Callable[[], object]] = {"ours": ours.eraser}
    for dtype, peer in peers.items():
        start = time.perf_counter()
        theirs = peer.eraser
        took[str(dtype)] = time.perf_counter() - start
        figures.append(residual(x, z, classes, theirs.proj_left, theirs.proj_right, theirs.bias))
        # At width 4096 it takes up to a minute and runs once; smaller widths interleave. A copy has no cached result.
        fresh = LeaceFitter(width, classes, dtype=dtype)
        fresh.mean_x, fresh.mean_z, fresh.n = peer.mean_x, peer.mean_z, peer.n
        fresh.sigma_xx_, fresh.sigma_xz_ = peer.sigma_xx_, peer.sigma_xz_
        if took[str(dtype)] < 8:
            candidates[str(dtype)] = lambda fresh=fresh: copy.copy(fresh).eraser
    seconds = took | interleaved(candidates, repeats)
    own, single, double = seconds["ours"], seconds["torch.float32"], seconds["torch.float64"]
    return (
        f"{width:>6} {classes:>4} {own:>8.3f} {single:>9.3f} {double:>9.3f} "
        f"{single / own:>9.1f} {double / own:>9.1f}   " + " ".join(f"{figure:>9.1e}" for figure in figures)
    )


def bench_apply(shape: tuple[int, ...], classes: int, repeats: int) -> str:
    flat, z = activations(shape[0] * shape[1], shape[2], classes)
    x, eraser = flat.view(shape), Eraser.fit(flat, z).to(dtype=torch.float32)
    peer = LeaceEraser(eraser.left, eraser.right, eraser.bias)
    other, compiled = torch.randn(shape), torch.compile(apply_erasure, dynamic=False)
    seconds = interleaved(
        {
            "add": lambda: x + other,
            "peer": lambda: peer(x),
            "ours": lambda: apply_erasure(x, eraser.left, eraser.right, eraser.bias),
            "compiled": lambda: compiled(x, eraser.left, eraser.right, eraser.bias),
        },
        repeats,
    )
    return (
        f"{shape!s:>16} {eraser.rank:>5} {seconds['ours'] * 1e3:>10.3f} {seconds['ours'] / seconds['add']:>10.2f} "
        f"{seconds['compiled'] / seconds['add']:>14.2f} {seconds['peer'] / seconds['add']:>12.2f} "
        f"{seconds['peer'] / seconds['ours']:>8.1f}"
    )


def peak_bytes(run: Callable[[], object]) -> int:
    """The most that torch's allocator held at any time during a call, above what it held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def bench_memory(width: int, kind: str) -> str:
    x, z = activations(ROWS, width, 17)
    if kind == "bfloat16":
        x = x.bfloat16()
    elif kind == "float64":
        x = x.double()
    mask = torch.arange(ROWS) % 10 != 0 if kind == "masked" else None
    # From no statistics, so that they are counted too; with two updates, so that merging is counted.
    moments = ConceptMoments(width, 17)
    peak = peak_bytes(lambda: moments.update(x, z, mask=mask).update(x, z, mask=mask))
    return f"{width:>6} {kind:>10} {peak / 2**20:>10.1f} {peak / 4 / width**2:>18.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="widths 768 and 2048, fewer rounds")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: 1)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", message=".*more rows.*")
    widths = (768, 2048) if options.quick else (768, 2048, 4096)
    print(f"torch {torch.__version__}, {options.threads} thread(s), CPU, float32, medians of interleaved rounds\n")

    print(f"Updating, {ROWS} rows a batch. floor = one float32 addmm_ of the full d x d product; target 1.3 x floor.")
    print(f"{'d':>6} {'k':>4} {'rows/s':>12} {'x floor':>10} {'peer x floor':>12} {'x peer':>10}")
    for width in widths:
        for classes in (2, 17):
            print(bench_update(width, classes, max(5, 60 * 768 // width // (3 if options.quick else 1))), flush=True)

    print("\nSolving. Targets: 20 x the peer at 2048, 30 x at 4096, with no larger correlation left.")
    print("The peer keeps its statistics in float32 (32) or float64 (64).")
    print(
        f"{'d':>6} {'k':>4} {'ours s':>8} {'peer32 s':>9} {'peer64 s':>9} {'x peer32':>9} {'x peer64':>9}   "
        f"{'left:ours':>9} {'peer32':>9} {'peer64':>9}"
    )
    for width in widths:
        for classes in (2, 17):
            print(bench_solve(width, classes, 3), flush=True)

    print("\nApplying. add = x + y elementwise; targets for rank 1: at most 1.3 x add, and compiled 1.05 x.")
    print(
        f"{'shape':>16} {'rank':>5} {'ours ms':>10} {'x add':>10} {'compiled x add':>14} {'peer x add':>12} "
        f"{'x peer':>8}"
    )
    for shape in ((2, 128, 768), (8, 512, 768), (4, 512, 2048)):
        for classes in (2, 17):
            print(bench_apply(shape, classes, 15 if options.quick else 60), flush=True)

    print("\nMemory while updating, statistics included. Target: 4 d^2 numbers of 4 bytes.")
    print(f"{'d':>6} {'rows':>10} {'MiB':>10} {'d^2 float32':>18}")
    for width in widths:
        for kind in ("float32", "bfloat16", "float64", "masked"):
            print(bench_memory(width, kind), flush=True)


if __name__ == "__main__":
    main()
