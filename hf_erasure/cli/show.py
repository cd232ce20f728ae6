"""The command that shows an adapter at work: a page on which sentences are read without it and with it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .adapters import Adapter, Model
from .app import app, lazy

if TYPE_CHECKING:
    from hf_erasure.adapters.common import config as configs
    from hf_erasure.adapters.gradiend import state
    from hf_erasure.adapters.merging import export
    from hf_erasure.models import heads, scorer, slots
    from hf_erasure.models import model as models
    from hf_erasure.recipes import run
else:
    configs, state, export = lazy("adapters.common.config", "adapters.gradiend.state", "adapters.merging.export")
    heads, scorer, slots, models, run = lazy(
        "models.heads", "models.scorer", "models.slots", "models.model", "recipes.run"
    )

Table = list[list[Any]]
WORDS = 5  # next words that are shown
ROWS = 400  # the most rows of a table; the probe is fitted on half of them
# Headings of the three tables that `Comparison` returns.
SIMILARITY = ["", "cosine similarity"]
NEXT = ["sentence", "without the adapter", "probability", "with the adapter", "probability "]
PROBE = ["sentence", "class", "without the adapter", "with the adapter"]


class Comparison:
    """What a model computes for sentences without its adapter and with it.

    Args:
        model: A folder, or a name on the Hub.
        adapter: The folder, or the name on the Hub, of an adapter of either kind.
        data: A table of texts for probes; without a table no probe is fitted.
        label: The table's column of classes.
        text: The table's column of texts.

    Raises:
        ValueError: The table lacks a column, or cannot be halved by class.
    """

    def __init__(
        self, model: str, adapter: str, data: str | None = None, label: str | None = None, text: str = "text"
    ) -> None:
        from transformers import AutoTokenizer

        if (data is None) != (label is None):
            raise ValueError("A probe needs both --data TABLE and --label COLUMN: give the other one, too.")
        self._halves: Any = None
        if data is not None and label is not None:
            rows = run.load_rows(data)
            rows = rows.shuffle(seed=0).select(range(min(ROWS, len(rows))))
            parts = run.set_aside(rows, 0.5, label_column=label, text_column=text, group_column=None, seed=0)
            self._halves = [(list(parts[name][text]), list(map(str, parts[name][label]))) for name in parts]
        self.model: Any = export.load_with_erasure(model, adapter)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(model)
        self.config: Any = self.model.active_peft_config
        pool = configs.Provenance.of(self.config).pool
        self.pool = str(pool) if pool in ("cls", "last") else "mean"
        self.task = heads.known_task(self.model)
        self.learning_rate: float | None = getattr(self.config, "learning_rate", None)  # None for an erasure
        self._probes: dict[Any, Any] = {}

    def steer(self, learning_rate: float) -> None:
        """Set how strongly a GRADIEND acts; an erasure has no such number and is left as it is."""
        if self.learning_rate is not None:
            state.steer(self.model, self.model.active_adapter, learning_rate=learning_rate)

    def similarity(self, sentences: Sequence[str]) -> Table:
        """The cosine of the embeddings of two sentences."""
        from torch.nn.functional import cosine_similarity

        for sentence in sentences:
            self._token_ids(sentence)
        both = [self._embeddings(sentences, acts) for acts in (False, True)]
        values = [round(float(cosine_similarity(one, other, dim=0)), 4) for one, other in both]
        return [["without the adapter", values[0]], ["with the adapter", values[1]]]

    def next_words(self, sentences: Sequence[str]) -> Table:
        """The likeliest next words of each sentence, or those at its mask; none if the model has no such head."""
        if self.task not in ("causal", "masked"):
            return []
        table: Table = []
        for sentence in sentences:
            mask = self.tokenizer.mask_token if self.task == "masked" else ""
            text = sentence if mask in sentence else f"{sentence} {mask}"
            without, with_it = (self._top_words(text, acts) for acts in (False, True))
            table += [[text, *one, *other] for one, other in zip(without, with_it, strict=True)]
        return table

    def class_shares(self, sentences: Sequence[str]) -> Table:
        """The classes of each sentence by two probes, fitted on half the table's rows without and with the adapter."""
        if self._halves is None:
            return []
        shares = [self._probe(acts).predict_proba(self._embeddings(sentences, acts).numpy()) for acts in (False, True)]
        names = self._probe(False).classes_
        return [
            [sentence, name, *(round(float(found[row, column]), 4) for found in shares)]
            for row, sentence in enumerate(sentences)
            for column, name in enumerate(names)
        ]

    def accuracy(self) -> str:
        """How often the probes are right on the other half, in a sentence; empty without a table."""
        if self._halves is None:
            return ""
        texts, labels = self._halves[1]
        right = [self._probe(acts).score(self._embeddings(texts, acts).numpy(), labels) for acts in (False, True)]
        return f"On {len(texts)} other rows the probe is right in {right[0]:.0%} without, in {right[1]:.0%} with it."

    def _adapter_context(self, acts: bool) -> Any:
        return nullcontext() if acts else self.model.disable_adapter()

    def _embeddings(self, texts: Sequence[str], acts: bool) -> Any:
        with self._adapter_context(acts):
            return scorer.pooled_embeddings(self.model, self.tokenizer, texts, pool=self.pool, truncate=True)

    def _token_ids(self, text: str) -> list[int]:
        """The tokens of a text. Raises `ValueError` if they are more than the model reads."""
        ids, most = (
            self.tokenizer(text, verbose=False)["input_ids"],
            slots.longest_input(self.tokenizer, self.model.config),
        )
        if most is not None and len(ids) > most:
            raise ValueError(f"{text[:40]!r}… has {len(ids)} tokens, and the model reads {most}: write a shorter text.")
        return ids

    def _top_words(self, text: str, acts: bool) -> Table:
        ids, inputs = self._token_ids(text), self.tokenizer(text, return_tensors="pt")
        place = ids.index(self.tokenizer.mask_token_id) if self.task == "masked" else len(ids) - 1
        with self._adapter_context(acts), models.evaluating(self.model):
            top = self.model(**inputs).logits[0, place].float().softmax(-1).topk(WORDS)
        words = [self.tokenizer.decode([word]).strip() for word in top.indices.tolist()]
        return [[word, round(share, 4)] for word, share in zip(words, top.values.tolist(), strict=True)]

    def _probe(self, acts: bool) -> Any:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        # With a GRADIEND, the embeddings of the texts differ at each strength.
        key = getattr(self.config, "learning_rate", True) if acts else None
        if key not in self._probes:
            texts, labels = self._halves[0]
            probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300))
            self._probes[key] = probe.fit(self._embeddings(texts, acts).numpy(), labels)
        return self._probes[key]


def page(found: Comparison, title: str) -> Any:
    """The page of a comparison, which `launch()` opens."""
    import gradio as gr

    def compare(one: str, other: str, learning_rate: float) -> list[Any]:
        if not one.strip() or not other.strip():
            raise gr.Error("Write two sentences.")
        found.steer(learning_rate)
        both = [one, other]
        try:
            return [found.similarity(both), found.next_words(both), found.class_shares(both), found.accuracy()]
        except ValueError as error:  # a sentence is too long
            raise gr.Error(str(error)) from error

    rate = found.learning_rate or 0.0
    limit = 5 * abs(rate) or 1.0
    with gr.Blocks(title=title, analytics_enabled=False) as blocks:
        gr.Markdown(f"# {title}\nTwo sentences, read without the adapter and with it.")
        with gr.Row():
            texts = [gr.Textbox("She is a nurse.", label="First sentence")]
            texts += [gr.Textbox("He is a nurse.", label="Second sentence")]
        slider = gr.Slider(-limit, limit, rate, label="Learning rate", visible=found.learning_rate is not None)
        button = gr.Button("Compare", variant="primary")
        similarity = gr.Dataframe(headers=SIMILARITY, label="Similarity", interactive=False)
        has_words = found.task in ("causal", "masked")
        words = gr.Dataframe(headers=NEXT, label="Next words", interactive=False, visible=has_words)
        has_probe = bool(found.accuracy())
        probe = gr.Dataframe(headers=PROBE, label="Probe", interactive=False, visible=has_probe)
        right = gr.Markdown(visible=has_probe)
        events = [button.click, *(text.submit for text in texts), slider.release]
        gr.on(events, compare, [*texts, slider], [similarity, words, probe, right])
    return blocks


@app.command()
def show(
    model: Model,
    adapter: Adapter,
    data: Annotated[str | None, typer.Option(help="A table of texts that probes are fitted on.")] = None,
    label: Annotated[str | None, typer.Option(help="The table's column of classes.")] = None,
    text: Annotated[str, typer.Option(help="The table's column of texts.")] = "text",
    port: Annotated[int, typer.Option(help="The port of the page, which only this machine serves.")] = 7860,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page in a browser.")] = True,
) -> None:
    """Open a page that reads two sentences without an adapter and with it.

    It shows their similarity, the next words, and what a probe says of the concept. Needs the extra `show`.

    Example: hf-erasure show bert-base-uncased out/no-gender --data people.csv --label gender
    """
    if find_spec("gradio") is None:
        raise ImportError("hf-erasure show needs gradio: pip install 'hf-erasure[show]'")
    if data is not None:
        run.require("sklearn")
    blocks = page(Comparison(model, adapter, data, label, text), f"{Path(adapter).name} on {Path(model).name}")
    blocks.launch(server_name="127.0.0.1", server_port=port, inbrowser=browser)
