"""python recipes/two_sources/search.py [DATA] [--model embedded] [--out out/two-sources]

Search across two sources: each thing is described by both, and one description should find the other among all texts.
In an encoder's embeddings, texts of one source are near each other whatever they are about, which disturbs the search.
So the source is erased, fitted on half of the things, and search is judged on the other half (after arXiv 2507.01234,
which erases the source by LEACE). Without DATA it uses the catalogue in two house styles that `catalogue.py` writes.

DATA is a CSV with the columns `pair`, `source` (two sources) and `text`; each pair has one text of each source. Or it
is `case-summaries`, the paper's court cases in the words of Wikipedia and of LexisNexis, which must be in
$HF_ERASURE_TEST_ASSETS (by default ../shared/assets).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from catalogue import rows as catalogue
from datasets import Dataset, Value
from torch import Tensor
from torch.nn.functional import normalize
from tqdm.auto import tqdm
from transformers import AutoModel, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[2]))  # so that this file also runs as a script

from hf_erasure import ConceptErasureConfig, concept_dataloader, fit_concept_erasure
from hf_erasure.erasers import ConceptMoments, Eraser
from hf_erasure.erasers.eraser import concept_columns
from hf_erasure.recipes import embedded_model
from hf_erasure.recipes.run import load_source
from recipes.studies import ASSETS

NAME = "no_source"
CASES = "case-summaries"
RESAMPLES = 1000
KS = (1, 10)
UNIT = ", unit vectors"
MAX_LENGTH, BATCH_SIZE = 256, 64  # tokens of a text, as the encoder was trained; texts of a batch


def read_texts(
    texts: list[str], base: str, cells: list[str], sources: list[int]
) -> tuple[Tensor, dict[str, ConceptMoments]]:
    """Means over tokens of the last hidden states, and the moments of each cell's tokens, in which a text weighs 1."""
    model, tokenizer = AutoModel.from_pretrained(base).eval(), AutoTokenizer.from_pretrained(base)
    by_length, width = sorted(range(len(texts)), key=lambda row: len(texts[row])), model.config.hidden_size
    states, moments = torch.zeros(len(texts), width), {cell: ConceptMoments(width, 2) for cell in sorted(set(cells))}
    with torch.inference_mode():
        for start in tqdm(range(0, len(texts), BATCH_SIZE), desc="embedding", unit="batch"):
            rows = by_length[start : start + BATCH_SIZE]
            told = [texts[row] for row in rows]
            inputs = tokenizer(told, padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
            hidden, mask = model(**inputs).last_hidden_state, inputs["attention_mask"]
            weight = mask.double() / mask.sum(1, keepdim=True)
            states[rows] = (hidden.double() * weight[..., None]).sum(1).float()
            ids = torch.tensor([sources[row] for row in rows])[:, None].expand(mask.shape)
            for cell, found in moments.items():
                real = mask.bool() & torch.tensor([cells[row] == cell for row in rows])[:, None]
                if real.any():
                    found.update(hidden[real], ids[real], weight[real])
    return states, moments


def found_at(states: Tensor, pairs: list[str]) -> Tensor:
    """For each text as a query against all others: the place, from 1, of the other text of its pair."""
    unit = normalize(states.double(), dim=-1)
    near = (unit @ unit.T).fill_diagonal_(-2)
    other = {}
    for row, pair in enumerate(pairs):
        other.setdefault(pair, []).append(row)
    counterpart = torch.tensor([next(r for r in other[pair] if r != row) for row, pair in enumerate(pairs)])
    return (near > near.gather(1, counterpart[:, None])).sum(1) + 1


def recall(places: Tensor, pairs: list[str], k: int) -> tuple[float, float, float]:
    """The share of queries whose counterpart is among the first k, and the 95 % interval of a bootstrap over pairs."""
    numbers = {pair: i for i, pair in enumerate(dict.fromkeys(pairs))}
    by_pair = torch.zeros(len(numbers), dtype=torch.double)
    by_pair.index_add_(0, torch.tensor([numbers[pair] for pair in pairs]), (places <= k).double() / 2)
    drawn = torch.randint(len(by_pair), (RESAMPLES, len(by_pair)), generator=torch.Generator().manual_seed(0))
    low, high = by_pair[drawn].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
    return float(by_pair.mean()), low, high


@dataclass
class Search:
    """Texts of two sources, with erasures that are fitted on some of the pairs and judged on others.

    Attributes:
        rows: Rows with `pair`, `source` and `text`.
        base: The model's folder or name.
        target: The last norm. Its erasure and the mean over tokens can be exchanged, so the erasure is one matrix
            after the pooling, and can be fitted and judged on the stored results of one pass over the texts.
        folder: Where these results are stored.
        splits: How many random halves there are.
    """

    rows: Dataset
    base: str
    target: str
    folder: Path
    splits: int = 1

    def __post_init__(self) -> None:
        self.sources = sorted(set(self.rows["source"]))
        at = {(row["pair"], row["source"]): number for number, row in enumerate(self.rows)}
        # By pair: the rows of the text of the first source and of the second.
        self.both = {pair: [at[pair, source] for source in self.sources] for pair in dict.fromkeys(self.rows["pair"])}
        self.parts = [self._parts(seed) for seed in range(self.splits)]
        self.cell = {pair: " ".join(part[pair] for part in self.parts) for pair in self.both}
        self.states, self.moments = self._read()
        self.unit = normalize(self.states, dim=-1)

    def _parts(self, seed: int) -> dict[str, str]:
        """Half of the pairs are fitted on (a quarter of them is kept to choose a rank); the other half is judged."""
        names = sorted(self.both)
        random.Random(seed).shuffle(names)
        half = len(names) // 2
        kept = 3 * half // 4
        return {pair: "fit" if i < kept else "choose" if i < half else "judge" for i, pair in enumerate(names)}

    def pairs(self, seed: int, *parts: str) -> list[str]:
        """The pairs in some parts of a split."""
        return [pair for pair, part in self.parts[seed].items() if part in parts]

    def _read(self) -> tuple[Tensor, dict[str, ConceptMoments]]:
        """Means over tokens `(texts, width)`, and moments of tokens as `pool="mean"` weighs them, of each cell.

        A cell has the pairs that are in the same part of every split. Both results are stored, to be computed once.
        """
        texts, cells = list(self.rows["text"]), [self.cell[pair] for pair in self.rows["pair"]]
        digest = hashlib.sha256(json.dumps([self.base, MAX_LENGTH, texts, cells]).encode()).hexdigest()
        kept = self.folder / f"read-{digest[:12]}.pt"
        if not kept.is_file():
            states, moments = read_texts(texts, self.base, cells, [self.sources.index(s) for s in self.rows["source"]])
            torch.save((states, {cell: found.state_dict() for cell, found in moments.items()}), kept)
        states, found = torch.load(kept)
        moments = {cell: ConceptMoments(states.shape[1], 2) for cell in found}
        for cell, state in found.items():
            moments[cell].load_state_dict(state)
        return states, moments

    def eraser(self, seed: int, parts: tuple[str, ...], rank: int) -> Eraser:
        """The eraser that `fit_concept_erasure(…, pool="mean")` finds at the last norm for some parts of a split.

        With a rank it also erases the mean difference within pairs and `rank` directions in which pairs differ most.
        """
        pairs, width = self.pairs(seed, *parts), self.states.shape[1]
        moments = ConceptMoments(width, 2)
        for cell in sorted({self.cell[pair] for pair in pairs}):
            moments = moments.merge(self.moments[cell])
        if not rank:
            return moments.eraser()
        both = self.states[torch.tensor([self.both[pair] for pair in pairs])]
        differences, signs = both[:, 0] - both[:, 1], torch.tensor([1.0, -1.0]).expand(len(pairs), 2)
        # Each difference with both signs, so that their mean is zero and centring removes nothing.
        ways = torch.cat([differences, -differences]), torch.cat([signs, -signs])
        spread = ConceptMoments(width, 2).update(*ways).spread()
        return moments.eraser(beside=[(concept_columns(spread), None), (spread.root(), rank)])

    def unit_eraser(self, seed: int, parts: tuple[str, ...], rank: int) -> Eraser:
        """An eraser of unit vectors, which a search by cosine compares: a matrix after the encoder, not an adapter.

        From the differences within pairs it takes the principal directions, those of the largest variance.
        """
        both = self.unit[torch.tensor([self.both[pair] for pair in self.pairs(seed, *parts)])]
        moments = ConceptMoments(both.shape[-1], 2).update(both, torch.arange(2).expand(len(both), 2))
        differences = (both[:, 0] - both[:, 1]).double()
        mean = differences.mean(0, keepdim=True)
        _, values, directions = torch.linalg.svd(differences - mean, full_matrices=False)
        beside = [(mean.T, None), ((values[:rank, None] * directions[:rank]).T, rank)]
        return moments.eraser(beside=beside if rank else ())

    def judge(self, judged: list[str], eraser: Eraser | None, states: Tensor) -> dict[str, tuple[float, float, float]]:
        """Recall on some pairs, with an erasure that was fitted on others, or without."""
        states = states[[row for pair in judged for row in self.both[pair]]].double()
        pairs = [pair for pair in judged for _ in self.sources]
        places = found_at(states if eraser is None else eraser(states), pairs)
        return {f"recall@{k}": recall(places, pairs, k) for k in KS}

    def split(self, seed: int, ranks: list[int], unit: bool) -> dict[str, Any]:
        """Fit on half the pairs and judge on the other half; ranks are chosen on a quarter of the first half."""
        kept, held, judged = (self.pairs(seed, part) for part in ("fit", "choose", "judge"))
        ways = {"": (self.eraser, self.states)} | ({UNIT: (self.unit_eraser, self.unit)} if unit else {})
        chosen, half, found = {}, ("fit", "choose"), {"before": self.judge(judged, None, self.states)}
        for where, (fitted, states) in ways.items():
            chosen[where] = ranks[0]
            if len(ranks) > 1:
                tried = {r: self.judge(held, fitted(seed, ("fit",), r), states)["recall@1"][0] for r in ranks}
                chosen[where] = max(ranks, key=tried.__getitem__)
            found[f"source erased{where}"] = self.judge(judged, fitted(seed, half, 0), states)
            if chosen[where]:
                found[f"and pairs{where}"] = self.judge(judged, fitted(seed, half, chosen[where]), states)
        counts = {"pairs fitted on": len(kept) + len(held), "pairs judged": len(judged)}
        return counts | {"rank of pairs": chosen, "recall": found}

    def write_adapter(self, rank: int) -> None:
        """Fit the erasure of the first split as an adapter of the encoder, and save it."""
        model, tokenizer = AutoModel.from_pretrained(self.base), AutoTokenizer.from_pretrained(self.base)
        config = ConceptErasureConfig(concept="source", labels=self.sources, target_modules=[self.target])
        model.add_adapter(config, adapter_name=NAME)
        # For directions within pairs each pair counts once: the first text gets the second as its counterfactual.
        others = {first: self.rows[second]["text"] for first, second in self.both.values()}
        rows = self.rows.add_column("other", [others.get(number) for number in range(len(self.rows))])
        part = rows.select(sorted(row for pair in self.pairs(0, "fit", "choose") for row in self.both[pair]))
        batches = concept_dataloader(
            part, tokenizer, text_column="text", label_column="source", labels=self.sources, max_length=MAX_LENGTH,
            counterfactual_column="other" if rank else None,
        )  # fmt: skip
        fit_concept_erasure(model, batches, NAME, pool="mean", sequential=False, progress=False, pair_rank=rank or None)
        model.save_pretrained(self.folder)


def report(splits: list[dict[str, Any]], sources: list[str]) -> str:
    """Both recalls before and after, as means of the splits, and a summary in words."""
    fitted, judged = splits[0]["pairs fitted on"], splits[0]["pairs judged"]
    lines = [
        f"{fitted} pairs fitted on, {judged} others judged; random halves: {len(splits)}.",
        f"Each text is searched among {2 * judged - 1} others; 95 % of a bootstrap over pairs in brackets.",
        "",
    ]
    for where in reversed(splits[0]["rank of pairs"]):
        ranks = [split["rank of pairs"][where] for split in splits]
        told = f"Directions within pairs{where}, chosen on a quarter of the fitted: {ranks}."
        lines[1:1] = [told] if any(ranks) else []
    first, width = {}, max(14, *(len(what) for what in splits[0]["recall"]))
    for k in KS:
        for what in splits[0]["recall"]:
            numbers = [split["recall"][what][f"recall@{k}"] for split in splits if what in split["recall"]]
            value, low, high = torch.tensor(numbers, dtype=torch.double).mean(0).tolist()
            first.setdefault(what, value)
            lines.append(f"recall@{k:<3} {what:<{width}} {value:.3f}  [{low:.3f}, {high:.3f}]")
    before, *_, after = first.values()
    return "\n".join([
        *lines,
        "",
        f"In plain words: a text of {sources[0]!r} was to find the one of {sources[1]!r} on the same thing, and back.",
        f"The first hit was right in {before:.0%} of the searches, and in {after:.0%} once the source was erased,",
        "on things that the erasure was not fitted on.",
    ])  # fmt: skip


def write_results(folder: Path, splits: list[dict[str, Any]], text: str) -> None:
    """Write `results.json` and `results.md`."""
    (folder / "results.json").write_text(json.dumps(splits, indent=1) + "\n", encoding="utf-8")
    command = shlex.join(["python", "recipes/two_sources/search.py", *sys.argv[1:]])
    told = f"# Search across two sources: results\n\n```\n{command}\n```\n\n```text\n{text}\n```\n"
    (folder / "results.md").write_text(told, encoding="utf-8")


def main() -> None:
    """Run the search with the options of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[2])
    parser.add_argument("data", nargs="?", help=f"A CSV with pair, source and text, or {CASES}; else the catalogue.")
    parser.add_argument("--model", default="embedded", help="An encoder like BERT whose embedding is the tokens' mean.")
    parser.add_argument("--target", default="encoder.layer.5.output.LayerNorm", help="Its last norm.")
    parser.add_argument("--ranks", type=int, nargs="+", default=[0], help="Directions within pairs to choose from.")
    parser.add_argument("--unit", action="store_true", help="Erase from unit vectors, too: behind the encoder.")
    parser.add_argument("--splits", type=int, default=1, help="How many random halves.")
    parser.add_argument("--out", type=Path, default=Path("out/two-sources"), help="Where the adapter and results go.")
    parser.add_argument("--results", type=Path, help="A folder for results.md and results.json.")
    given = parser.parse_args()
    data = given.data
    if data == CASES:
        data = str(Path(os.environ.get("HF_ERASURE_TEST_ASSETS", ASSETS)) / "data" / CASES / "wikipedia_lexisnexis.csv")
    rows = load_source(data)["train"] if data else Dataset.from_list(catalogue())
    rows = rows.cast_column("pair", Value("string"))
    base = embedded_model() if given.model == "embedded" else given.model
    given.out.mkdir(parents=True, exist_ok=True)
    search = Search(rows, base, given.target, given.out, given.splits)
    splits = [search.split(seed, given.ranks, given.unit) for seed in range(given.splits)]
    (given.out / "search.json").write_text(json.dumps(splits, indent=1) + "\n", encoding="utf-8")
    text = report(splits, search.sources)
    if given.results is not None:
        write_results(given.results, splits, text)
    sys.stdout.write(f"{text}\n")
    search.write_adapter(splits[0]["rank of pairs"][""])
    sys.stdout.write(f"adapter of the first half: {given.out}\n")


if __name__ == "__main__":
    main()
