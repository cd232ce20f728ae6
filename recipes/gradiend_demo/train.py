"""python recipes/gradiend_demo/train.py out/gradiend-demo

Train a very small masked language model on sentences that this file makes, in seconds, so that the demo works without
the Hub. It learns which names go with "he" or "she", and a little about what people do.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

NAMES = {
    "she": ["anna", "mary", "lily", "emma", "sara", "julia", "ruth", "clara", "alice", "grace", "helen", "rose"],
    "he": ["tom", "ben", "john", "paul", "max", "peter", "leo", "mark", "david", "hugo", "karl", "fred"],
}
# The share of sentences in which a name has the other pronoun, so that an edit can still strengthen a pronoun.
FLIPPED = 0.1
PLACES = ["park", "shop", "school", "garden", "river", "market", "station", "library"]
THINGS = ["book", "cake", "letter", "song", "picture", "story", "map", "dress"]
MADE = ["found", "made", "loved", "lost", "sold", "read", "kept", "saw"]
FELT = ["happy", "tired", "late", "hungry", "cold", "early", "proud", "glad"]
WHEN = ["today", "yesterday", "again", "soon", "often"]
SENTENCES = [
    "{name} went to the {place} because {he} was {felt} .",
    "{name} {made} the {thing} and {he} was {felt} {when} .",
    "{when} {name} was {felt} when {he} {made} a {thing} .",
    "{name} said that {he} {made} the {thing} at the {place} .",
    "at the {place} {name} {made} a {thing} before {he} was {felt} .",
    "{name} was {felt} so {he} went to the {place} {when} .",
]
NEUTRAL = [
    "the {thing} at the {place} was old .",
    "a {thing} and a {thing2} were at the {place} {when} .",
    "they went to the {place} {when} and {made} a {thing} .",
    "it was {felt} at the {place} {when} .",
    "the {place} was near the {place2} .",
]
STEPS, ROWS = 300, 64
SIZES = {
    "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 128,
    "max_position_embeddings": 24,
}  # fmt: skip


def sentences(count: int, seed: int, neutral_share: float = 0.15) -> list[str]:
    """`count` sentences, drawn at random."""
    draw, found = random.Random(seed), []
    for _ in range(count):
        pronoun = draw.choice(["she", "he"])
        name = draw.choice(NAMES[pronoun])
        if draw.random() < FLIPPED:
            pronoun = "he" if pronoun == "she" else "she"
        template = draw.choice(NEUTRAL if draw.random() < neutral_share else SENTENCES)
        found.append(
            template.format(
                name=name,
                he=pronoun,
                place=draw.choice(PLACES),
                place2=draw.choice(PLACES),
                made=draw.choice(MADE),
                thing=draw.choice(THINGS),
                thing2=draw.choice(THINGS),
                felt=draw.choice(FELT),
                when=draw.choice(WHEN),
            )
        )
    return found


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each word."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = {word for text in sentences(4000, seed=0) for word in text.split()}
    known = [*special, *sorted(words.union(*NAMES.values()))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def train(folder: Path) -> float:
    """Write the model, its tokenizer and neutral texts to `folder`; returns the loss of the last steps."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    model = BertForMaskedLM(
        BertConfig(
            **SIZES, vocab_size=len(tokenizer), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            initializer_range=0.1,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=STEPS)
    pronouns = torch.tensor(tokenizer.convert_tokens_to_ids(["she", "he"]))
    texts, recent = sentences(STEPS * ROWS, seed=1), []
    for step in range(STEPS):
        batch = tokenizer(texts[step * ROWS : (step + 1) * ROWS], padding=True, return_tensors="pt")
        ids = batch["input_ids"]
        # The demo is about pronouns, so they are masked more often than other words.
        chosen = (torch.rand(ids.shape) < torch.where(torch.isin(ids, pronouns), 0.9, 0.1)) & (ids > 4)
        labels = ids.masked_fill(~chosen, -100)
        batch["input_ids"] = ids.masked_fill(chosen, tokenizer.mask_token_id)
        loss = model(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        recent = [*recent[-19:], loss.item()]
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    neutral = dict.fromkeys(sentences(1500, seed=2, neutral_share=1.0))
    (folder / "neutral.txt").write_text("\n".join(neutral) + "\n", encoding="utf-8")
    return sum(recent) / len(recent)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python recipes/gradiend_demo/train.py FOLDER")
    sys.stdout.write(f"loss {train(Path(sys.argv[1])):.3f}, model and neutral texts: {sys.argv[1]}\n")
