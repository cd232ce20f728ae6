"""One study of gender over seven architectures: models that are not given as trained are trained here, from configs.

The models that are trained here are tiny, and know little more than which pronoun follows which name.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
)

sys.path.insert(0, str(Path(__file__).parents[2]))  # so that this file also runs as a script

from recipes import studies
from recipes.gradiend_gender import study as gender

HEADS = {"causal": AutoModelForCausalLM, "masked": AutoModelForMaskedLM, "seq2seq": AutoModelForSeq2SeqLM}
SENTINELS = [f"<extra_id_{number}>" for number in range(10)]
IGNORED = -100
# BERT's names of weights → their names in DistilBERT.
RENAMED = {
    "encoder.layer.": "transformer.layer.",
    "attention.self.query": "attention.q_lin",
    "attention.self.key": "attention.k_lin",
    "attention.self.value": "attention.v_lin",
    "attention.output.dense": "attention.out_lin",
    "attention.output.LayerNorm": "sa_layer_norm",
    "intermediate.dense": "ffn.lin1",
    "output.dense": "ffn.lin2",
    "output.LayerNorm": "output_layer_norm",
}
# Sentences that the models learn from, in addition to the prompts of the choice material. None of them is reported on.
LESSONS = [
    "{name} was sick. Then {pronoun} went to bed.",
    "{name} cried because {pronoun} wanted to go home.",
    "{name} smiled when {pronoun} saw the cat.",
    "{name} was so sad that {pronoun} cried.",
    "{name} liked to run, but {pronoun} was slow.",
    "{name} played until {pronoun} was hungry.",
    "{name} wanted a dog, so {pronoun} asked mom.",
    "{name} hoped that {pronoun} was big.",
    "{name} was happy and {pronoun} smiled.",
    "{name} went out while {pronoun} was wet.",
]


@dataclass
class Built:
    """A model that is trained here.

    Attributes:
        task: `"causal"`, `"masked"` or `"seq2seq"`.
        tokenizer: Name of a model whose tokenizer it shares.
        config: A configuration of transformers, with `model_type`.
        start: Name of a model from whose body it takes the weights that fit.
        lessons: How its lessons differ from the common ones.
    """

    task: str
    tokenizer: str
    config: dict[str, Any]
    start: str | None = None
    lessons: dict[str, Any] = field(default_factory=dict)


@dataclass
class Lessons:
    """How the models are trained: AdamW, a linear rise and fall of the learning rate.

    Attributes:
        steps: Steps of the optimizer.
        rows: Sequences in a step.
        length: Tokens in a sequence.
        learning_rate: The highest learning rate.
        sentences: How many are drawn from names and lessons, and shuffled among the pieces of stories.
        sampled: How many stories of `sampled_length` tokens the model `sampler` writes.
        sampler: Name of a causal model.
        mask_share: Share of tokens that are masked, for a masked or an encoder-decoder model.
    """

    steps: int = 400
    rows: int = 24
    length: int = 48
    learning_rate: float = 3e-3
    sentences: int = 4000
    sampled: int = 96
    sampled_length: int = 200
    sampler: str = "Llama"
    mask_share: float = 0.18


@dataclass
class Settings(gender.Settings):
    """The settings of the gender study, and the models that are trained here.

    Attributes:
        build: Name → the model to train.
        lessons: How the models are trained.
        folder: Where trained models are kept; a model that is already there is not trained again.
    """

    build: dict[str, Any] = field(default_factory=dict)
    lessons: Any = field(default_factory=dict)
    folder: str = "out/gradiend_architectures"

    def __post_init__(self) -> None:
        self.build = {name: Built(**facts) for name, facts in self.build.items()}
        self.lessons = Lessons(**self.lessons)


# ---- training -------------------------------------------------------------------------------------------------------


def taught_texts(settings: Settings, split: gender.Split) -> list[str]:
    """The training texts: sentences with names, the stories that are not reported on, and sampled stories."""
    order = random.Random(settings.seeds[0])
    prompts = [prompt.replace("[FEATURE]", "{pronoun}") for prompt in settings.materials["choice"].prompts] + LESSONS
    texts = []
    for _ in range(settings.lessons.sentences):
        label = order.choice(settings.classes)
        name = order.choice([n for material in settings.materials.values() for n in getattr(material, label)])
        texts.append(order.choice(prompts).format(name=name, pronoun=settings.words[label]))
    kept = set(split.test.stories["text"])
    told = [story for story in gender.read_stories(settings.stories) if story[: settings.letters] not in kept]
    told += sampled_stories(settings)
    # Pieces of a few sentences, so that stories and lessons are mixed.
    pieces = [". ".join(parts) for story in told for parts in _threes(story.split(". "))]
    texts += pieces
    order.shuffle(texts)
    return texts


def _threes(parts: list[str]) -> list[list[str]]:
    return [parts[start : start + 3] for start in range(0, len(parts), 3)]


@torch.no_grad()
def sampled_stories(settings: Settings) -> list[str]:
    """Stories that the sampler writes."""
    lessons = settings.lessons
    if not lessons.sampled:
        return []
    torch.manual_seed(settings.seeds[0])
    model, tokenizer = gender.load(settings.models[lessons.sampler])
    start = torch.full((lessons.sampled, 1), tokenizer.bos_token_id)
    written = model.generate(
        input_ids=start, attention_mask=torch.ones_like(start), do_sample=True, top_p=0.95,
        max_new_tokens=lessons.sampled_length, pad_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return tokenizer.batch_decode(written, skip_special_tokens=True)


def begin_with(model: Any, other: Any) -> int:
    """Copy the weights of another model's body into those of the same name and shape; returns how many."""
    own, count = model.base_model.state_dict(), 0
    for name, weight in other.base_model.state_dict().items():
        renamed = name
        for old, new in RENAMED.items():
            renamed = renamed.replace(old, new)
        for candidate in (name, renamed):
            if candidate in own and own[candidate].shape == weight.shape:
                own[candidate].copy_(weight)
                count += 1
                break
    return count


def train(built: Built, settings: Settings, texts: list[str], folder: Path) -> None:
    """Train a model from its config, and save it with its tokenizer."""
    lessons = replace(settings.lessons, **built.lessons)
    torch.manual_seed(settings.seeds[0])
    tokenizer = AutoTokenizer.from_pretrained(settings.models[built.tokenizer])
    if built.task == "seq2seq":
        tokenizer.add_tokens(SENTINELS, special_tokens=True)
    known = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id or 0}
    known |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    options = dict(built.config)
    config = AutoConfig.for_model(options.pop("model_type"), **known | options)
    model = HEADS[built.task].from_config(config).train()
    if built.start is not None:
        begin_with(model, gender.load(settings.models[built.start])[0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=lessons.learning_rate, weight_decay=0.01)
    warmup = max(1, lessons.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warmup, (lessons.steps - s) / max(1, lessons.steps - warmup))
    )
    for batch in batches(texts, tokenizer, built.task, lessons):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    typer.echo(f"  {folder.name}: training loss {loss.item():.2f}", err=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def batches(texts: list[str], tokenizer: Any, task: str, lessons: Lessons) -> Iterator[dict[str, Tensor]]:
    """Batches for the task's model, from sequences of whole texts one after the other."""
    order = random.Random(0)
    lead, trail = gender.ends(tokenizer)
    room = lessons.length - len(lead) - len(trail)
    tokens = [t for ids in tokenizer(texts, add_special_tokens=False)["input_ids"] for t in ids]
    rows = [[*lead, *tokens[at : at + room], *trail] for at in range(0, len(tokens) - room, room)]
    for _ in range(lessons.steps):
        chosen = torch.tensor(order.sample(rows, min(lessons.rows, len(rows))))
        yield lesson(chosen, tokenizer, task, lessons.mask_share, order)


def lesson(rows: Tensor, tokenizer: Any, task: str, share: float, order: random.Random) -> dict[str, Tensor]:
    """One batch: `(rows, length)` tokens as inputs and labels."""
    if task == "causal":
        return {"input_ids": rows, "labels": rows}
    lead, trail = gender.ends(tokenizer)
    within = range(len(lead), rows.shape[1] - len(trail))
    count = round(share * len(within))
    if task == "seq2seq":
        # Half of the batches have one long hole, from which attention is learned; the others have holes of one token.
        if order.random() < 0.5:
            return _long_hole(rows, tokenizer, order.choice(within[: len(within) // 2]), len(within) // 2)
        count = min(count, len(SENTINELS))
    places = torch.tensor([sorted(order.sample(within, count)) for _ in range(len(rows))])
    taken = rows.gather(1, places)
    if task == "masked":
        labels = torch.full_like(rows, IGNORED).scatter(1, places, taken)
        return {"input_ids": rows.scatter(1, places, tokenizer.mask_token_id), "labels": labels}
    holes = torch.tensor(tokenizer.convert_tokens_to_ids(SENTINELS))[:count].expand(len(rows), -1)
    target = torch.stack([holes, taken], dim=2).flatten(1)
    labels = torch.stack([torch.full_like(taken, IGNORED), taken], dim=2).flatten(1)
    return _encoder_decoder(rows.scatter(1, places, holes), target, labels)


def _long_hole(rows: Tensor, tokenizer: Any, start: int, length: int) -> dict[str, Tensor]:
    """Take out `length` tokens from `start` on, to be predicted."""
    hole = torch.full((len(rows), 1), tokenizer.convert_tokens_to_ids(SENTINELS[0]))
    taken = rows[:, start : start + length]
    source = torch.cat([rows[:, :start], hole, rows[:, start + length :]], dim=1)
    return _encoder_decoder(
        source, torch.cat([hole, taken], dim=1), torch.cat([torch.full_like(hole, IGNORED), taken], dim=1)
    )


def _encoder_decoder(source: Tensor, target: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Inputs and labels of the decoder, shifted by one token; the sentinels in `target` are given, not predicted."""
    start = torch.zeros(len(target), 1, dtype=torch.long)
    return {"input_ids": source, "decoder_input_ids": torch.cat([start, target[:, :-1]], dim=1), "labels": labels}


# ---- the study ------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One architecture.

    Attributes:
        kind: The model's class.
        weights: How many weights it has.
        seconds: How long training took; None for a model that was given trained.
        outcomes: The outcomes of the gender study, one for each seed.
    """

    kind: str
    weights: int
    seconds: float | None
    outcomes: list[gender.Outcome]


def models(settings: Settings) -> dict[str, tuple[str, float | None]]:
    """Name → folder of the model, and how many seconds training took."""
    found: dict[str, tuple[str, float | None]] = {name: (path, None) for name, path in settings.models.items()}
    texts: list[str] = []
    for name, built in settings.build.items():
        folder = Path(settings.folder) / name
        clock = folder / "seconds.txt"
        if not clock.is_file():
            split = gender.split_data(gender.read_stories(settings.stories), settings, settings.seeds[0])
            texts = texts or taught_texts(settings, split)
            started = time.perf_counter()
            train(built, settings, texts, folder)
            clock.write_text(f"{time.perf_counter() - started:.1f}", encoding="utf-8")
        found[name] = (str(folder), float(clock.read_text(encoding="utf-8")))
    return found


def run(settings: Settings) -> dict[str, Row]:
    """Run every architecture."""
    rows = {}
    for name, (path, seconds) in models(settings).items():
        typer.echo(name, err=True)
        model, _ = gender.load(path)
        count = sum(parameter.numel() for parameter in model.parameters())
        outcomes = [gender.run_seed(path, settings, seed) for seed in settings.seeds]
        rows[name] = Row(type(model).__name__, count, seconds, outcomes)
    return rows


def table(rows: dict[str, Row], settings: Settings) -> str:
    """The results table."""
    lines = []
    for name, row in rows.items():
        fits = [outcome.fits[outcome.written] for outcome in row.outcomes]
        cells = [f"{row.weights / 1e6:.2f} M", "given" if row.seconds is None else f"{row.seconds:.0f} s"]
        cells += [gender.spread([fit.encoding[key] for fit in fits], ".3f") for key in ("cor", "cor_enc")]
        for goal in settings.goals:
            before, after = ([getattr(f.edits[goal], at).goals[goal] for f in fits] for at in ("before", "after"))
            cells += [f"{gender.spread(before, '.3f')} → {gender.spread(after, '.3f')}"]
            cells += [gender.spread([fit.edits[goal].times(goal) for fit in fits], ".1f")]
            cells += [gender.spread([fit.edits[goal].after.cost for fit in fits], ".1%")]
        lines.append([name, row.kind, *cells])
    head = ["architecture", "class", "weights", "trained in", "cor", "cor_enc"]
    for goal in settings.goals:
        head += [goal, f"{goal} ×", "cost"]
    return gender.markdown(head, lines, 2)


def write(rows: dict[str, Row], settings: Settings, command: str) -> str:
    """Write the table to the output folder; returns the text."""
    output = Path(settings.output)
    output.mkdir(parents=True, exist_ok=True)
    text = "\n\n".join(
        [
            "# GRADIEND, gender, over architectures: results",
            f"```\n{command}\n```",
            f"Closed form, source {settings.source}, density {settings.density:g}; seeds {settings.seeds}. The "
            f"interval of an edit's cost on the choice stories ends at {settings.budget:.1%} at most; everything is "
            "measured on unseen names, prompts and stories. The cost is a share of the loss, for masked models of the "
            "accuracy.",
            table(rows, settings),
            "",
        ]
    )
    (output / "results.md").write_text(text, encoding="utf-8")
    return text


def main(settings_file: Path, overrides: list[str] = typer.Argument(default_factory=list)) -> None:  # noqa: B008
    """Run the study of SETTINGS_FILE. Write KEY=VALUE after it to change a setting."""
    settings = gender.read_settings(settings_file, overrides, Settings)
    command = " ".join(["python recipes/gradiend_architectures/study.py", str(settings_file), *overrides])
    typer.echo(write(run(settings), settings, command))


if __name__ == "__main__":
    studies.start(main)
