"""What blocks of the documentation presuppose: small models under the names of large ones, and data.

`from_pretrained("bert-base-uncased")` looks for a folder of that name before it asks the Hub. So a set-up puts a small
model there, in the folder where the page is run, and the block remains as a reader will type it.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import peft
import torch
import transformers as hf
from datasets import Dataset
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hf_erasure import (
    ConceptErasureCallback,
    ConceptErasureConfig,
    GradiendCallback,
    GradiendConfig,
    GradiendTrainer,
    GradiendTrainingArguments,
    combine_adapters,
    concept_dataloader,
    fit_concept_erasure,
)
from hf_erasure.adapters import steer
from hf_erasure.fitting.gradiend import pairs_from_templates
from hf_erasure.recipes.occupations import occupation_sentences
from tests import prepared
from tests.small_models import roughen

if TYPE_CHECKING:
    from tests.docs.running import Page

ROOT = Path(__file__).resolve().parents[2]
SETUPS: dict[str, Callable[[Page], None]] = {}
LABELS = ["female", "male"]


def setup(function: Callable[[Page], None]) -> Callable[[Page], None]:
    """Make a function available to pages under its name."""
    SETUPS[function.__name__] = function
    return function


def once_a_run(make: Callable[[Page, Path], Path]) -> Callable[[Page], Path]:
    """A function that returns one folder in all workers of a test run; the first worker that needs it makes it."""

    def made(page: Page) -> Path:
        # It is beside the folders of all tests, or of all workers, which pytest removes after a few more runs.
        place = page.folder.parents["PYTEST_XDIST_WORKER" in os.environ] / make.__name__
        with FileLock(f"{place}.lock"):
            if not (place / "made").is_file():
                place.mkdir(exist_ok=True)
                (place / "made").write_text(str(make(page, place)))
        return Path((place / "made").read_text())

    return made


# ---- models ----------------------------------------------------------------------------------------------------------


def _words_of(texts: Iterable[str]) -> list[str]:
    return sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]", text.lower())})


def _tokenizer(words: list[str], special: dict[str, str], template: str, decoder: Any) -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each lower-case word."""
    known = [*dict.fromkeys([*special.values(), *words])]
    ids = {word: index for index, word in enumerate(known)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=special["unk_token"]))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    frame = [(token, ids[token]) for token in special.values() if token in template]
    tokenizer.post_processor = processors.TemplateProcessing(template, None, frame)
    tokenizer.decoder = decoder
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_input_names=["input_ids", "attention_mask"], **special
    )


@functools.cache
def _demo() -> Any:
    """The script that trains the masked model of the demo."""
    path = ROOT / "recipes" / "gradiend_demo" / "train.py"
    spec = importlib.util.spec_from_file_location("gradiend_demo_train", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@once_a_run
def _bert(page: Page, folder: Path) -> Path:
    """A masked language model that has learned which pronoun goes with which name; trained in seconds."""
    demo = _demo()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]",
               "mask_token": "[MASK]"}  # fmt: skip
    names = [name for group in demo.NAMES.values() for name in group]
    texts = [*demo.sentences(4000, seed=0), *occupation_sentences()["train"]["text"], *names]

    def tokenizer() -> PreTrainedTokenizerFast:
        return _tokenizer(_words_of(texts), special, "[CLS] $A [SEP]", decoders.WordPiece())

    original = demo.make_tokenizer, demo.STEPS
    demo.make_tokenizer, demo.STEPS = tokenizer, 150
    try:
        demo.train(folder)
    finally:
        demo.make_tokenizer, demo.STEPS = original
    _lengthen(folder / "model", 64)
    return folder


def _lengthen(path: Path, length: int) -> None:
    """Give a model positions for texts longer than those it was trained on."""
    short = hf.AutoModelForMaskedLM.from_pretrained(path)
    model = type(short)(hf.AutoConfig.from_pretrained(path, max_position_embeddings=length))
    state, name = short.state_dict(), "bert.embeddings.position_embeddings.weight"
    known = state.pop(name)
    model.load_state_dict(state, strict=False)
    model.state_dict()[name][: len(known)] = known
    model.save_pretrained(path)


def _random_llama(page: Page, name: str) -> None:
    """A Llama with random weights whose tokenizer has the words of the page."""
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    words = _words_of([page.path.read_text(encoding="utf-8"), *occupation_sentences()["train"]["text"]])
    tokenizer = _tokenizer(words, special, "<s> $A", decoders.WordPiece(prefix="##"))
    config = hf.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, max_position_embeddings=128, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = roughen(hf.LlamaForCausalLM(config), torch.Generator().manual_seed(0))
    model.save_pretrained(page.folder / name)
    tokenizer.save_pretrained(page.folder / name)


@once_a_run
def _gpt(page: Page, folder: Path) -> Path:
    """A causal language model trained on the same sentences, in seconds."""
    demo, steps, rows = _demo(), 150, 64
    texts = demo.sentences(steps * rows, seed=1)
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "[BOS]", "eos_token": "[EOS]"}
    tokenizer = _tokenizer(_words_of(texts), special, "[BOS] $A", decoders.WordPiece())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = hf.GPT2Config(
            vocab_size=len(tokenizer), n_embd=64, n_layer=2, n_head=4, n_positions=32, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, pad_token_id=0, bos_token_id=2, eos_token_id=3, loss_type="ForCausalLM",
        )  # fmt: skip
        model = hf.GPT2LMHeadModel(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
        for step in range(steps):
            part = [f"{text} [EOS]" for text in texts[step * rows : (step + 1) * rows]]
            batch = tokenizer(part, padding=True, return_tensors="pt")
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            model(**batch, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    tokenizer.pad_token = None  # as that of the Hub's gpt2
    for part in (model, tokenizer):
        part.save_pretrained(folder)
    return folder


@setup
def small_gpt2(page: Page) -> None:
    """`gpt2`: two layers, trained on sentences about people with names; `names.csv`, prompts with the gender."""
    shutil.copytree(_gpt(page), page.folder / "gpt2")
    starts = ["{} said that", "{} kept the map and", "{} went to the park because", "today {} was happy when"]
    rows = [{"text": start.format(name), "gender": label} for label, pronoun in zip(LABELS, ("she", "he"), strict=True)
            for name in _demo().NAMES[pronoun] for start in starts]  # fmt: skip
    Dataset.from_list(rows).to_csv(page.folder / "names.csv", index=False)


@setup
def small_bert(page: Page) -> None:
    """`bert-base-uncased`: one layer, trained on sentences about people with names."""
    shutil.copytree(_bert(page) / "model", page.folder / "bert-base-uncased")


@setup
def small_llama(page: Page) -> None:
    """`meta-llama/Llama-3.2-1B`: two layers with random weights."""
    _random_llama(page, "meta-llama/Llama-3.2-1B")


@setup
def demo_model(page: Page) -> None:
    """The folder of `python recipes/gradiend_demo/train.py out/gradiend-demo`, after a third of its steps."""
    with mock.patch.object(_demo(), "STEPS", 100):
        _demo().train(page.folder / "out" / "gradiend-demo")


# ---- data ------------------------------------------------------------------------------------------------------------


@functools.cache
def _sentences(rows: int = 240) -> Dataset:
    return occupation_sentences()["train"].shuffle(seed=0).select(range(rows))


@setup
def biographies(page: Page) -> None:
    """`biographies.csv`, with `text` and `gender`."""
    _sentences().select_columns(["text", "gender"]).to_csv(page.folder / "biographies.csv", index=False)


@setup
def stories(page: Page) -> None:
    """`stories.txt`, one paragraph in each line: text that is not about the concept."""
    (page.folder / "stories.txt").write_text("\n".join(_neutral(60)), encoding="utf-8")


@setup
def neutral(page: Page) -> None:
    """`neutral.txt`, one sentence in each line, without words of gender."""
    (page.folder / "neutral.txt").write_text("\n".join(_neutral(60)), encoding="utf-8")


def _neutral(count: int) -> list[str]:
    return list(dict.fromkeys(_demo().sentences(10 * count, seed=2, neutral_share=1.0)))[:count]


# ---- fitted adapters and training ------------------------------------------------------------------------------------


@setup
def no_gender(page: Page) -> None:
    """`no-gender/`: an erasure of the small BERT; also `base`, `tokenizer` and `batches`."""
    model, tokenizer = (auto.from_pretrained(_bert(page) / "model") for auto in (hf.AutoModel, hf.AutoTokenizer))
    batches = concept_dataloader(_sentences(), tokenizer, label_column="gender", labels=LABELS)
    model.add_adapter(ConceptErasureConfig(concept="gender", labels=LABELS), adapter_name="no_gender")
    fit_concept_erasure(model, batches, "no_gender", progress=False)
    model.save_pretrained(page.folder / "no-gender")


@setup
def erasing(page: Page) -> None:
    """A model without an adapter, and labelled batches for fitting and for measuring."""
    path = _bert(page) / "model"
    tokenizer = hf.AutoTokenizer.from_pretrained(path)
    rows = _sentences()
    loaders = [
        concept_dataloader(rows.select(part), tokenizer, label_column="gender", labels=LABELS)
        for part in (range(160), range(160, 240))
    ]
    page.namespace |= {
        "model": hf.AutoModel.from_pretrained(path), "tokenizer": tokenizer, "batches": loaders[0],
        "held_out": loaders[1],
    }  # fmt: skip


@setup
def training(page: Page) -> None:
    """A classifier for fine-tuning: model, arguments and rows; and batches labelled with the concept."""
    erasing(page)
    path, rows = _bert(page) / "model", _sentences()
    tokenizer = page.namespace["tokenizer"]
    fields = sorted(set(rows["field"]))
    encoded = rows.map(lambda row: {**tokenizer(row["text"]), "labels": fields.index(row["field"])})
    page.namespace |= {
        "model": hf.AutoModelForSequenceClassification.from_pretrained(path, num_labels=len(fields)),
        "rows": encoded.select_columns(["input_ids", "attention_mask", "labels"]),
        "args": _arguments(page),
        "Trainer": functools.partial(hf.Trainer, processing_class=tokenizer),
    }


def _arguments(page: Page) -> hf.TrainingArguments:
    return hf.TrainingArguments(
        str(page.folder / "trained"), max_steps=4, per_device_train_batch_size=8, logging_steps=2, report_to="none",
        use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip


@setup
def fine_tuning_mlm(page: Page) -> None:
    """Masked language modelling: arguments and texts for `Trainer`, with the tokenizer and a collator that masks."""
    tokenizer = hf.AutoTokenizer.from_pretrained(_bert(page) / "model")
    collator = hf.DataCollatorForLanguageModeling(tokenizer)
    page.namespace |= {
        "args": _arguments(page),
        "texts": _sentences().map(lambda row: tokenizer(row["text"])).select_columns(["input_ids", "attention_mask"]),
        "Trainer": functools.partial(hf.Trainer, processing_class=tokenizer, data_collator=collator),
    }


@once_a_run
def _gender(page: Page, folder: Path) -> Path:
    """A feature of the small BERT, with its encoder, that remains active beside other adapters."""
    path, names = _bert(page) / "model", _demo().NAMES
    model, tokenizer = (a.from_pretrained(path) for a in (hf.AutoModelForMaskedLM, hf.AutoTokenizer))
    pairs, held_out = (
        pairs_from_templates(
            ["{name} said that [FEATURE] was late today.", "{name} went to the park because [FEATURE] was happy."],
            {label: names[pronoun][part] for label, pronoun in zip(LABELS, ("she", "he"), strict=True)},
            {"female": ["she"], "male": ["he"]},
            LABELS,
        )
        for part in (slice(0, 6), slice(6, 8))
    )
    config = GradiendConfig(feature="gender", classes=LABELS, density=0.2, keep_encoder=True, sticky=True)
    model.add_adapter(config, adapter_name="gender")
    arguments = GradiendTrainingArguments(str(folder / "run"), per_device_train_batch_size=1, disable_tqdm=True)
    GradiendTrainer(model, arguments, train_dataset=pairs, eval_dataset=held_out, processing_class=tokenizer).train()
    steer(model, "gender", learning_rate=0.01)
    model.save_pretrained(folder / "gender")
    return folder / "gender"


@once_a_run
def _classifier(page: Page, folder: Path) -> Path:
    """A classifier of law and health, trained on rows in which law is mostly men's, health women's; with an erasure."""
    fields = ["health", "law"]
    tokenizer = hf.AutoTokenizer.from_pretrained(_bert(page) / "model")
    rows = occupation_sentences()["train"].filter(lambda row: row["field"] in fields).shuffle(seed=0)
    usual = {"health": "female", "law": "male"}
    skewed = rows.filter(lambda row: row["gender"] == usual[row["field"]] or row["template"] % 10 == 1)
    encoded = skewed.map(lambda row: {**tokenizer(row["text"]), "labels": fields.index(row["field"])})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = hf.AutoModelForSequenceClassification.from_pretrained(
            _bert(page) / "model", id2label=dict(enumerate(fields)), label2id={f: i for i, f in enumerate(fields)}
        )
        arguments = hf.TrainingArguments(
            str(folder / "run"), num_train_epochs=8, learning_rate=1e-3, report_to="none", use_cpu=True,
            save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        encoded = encoded.select_columns(["input_ids", "attention_mask", "labels"])
        hf.Trainer(model, arguments, train_dataset=encoded, processing_class=tokenizer).train()
    model.save_pretrained(folder / "model")
    model.add_adapter(ConceptErasureConfig(concept="gender", labels=LABELS), adapter_name="no_gender")
    batches = concept_dataloader(rows, tokenizer, label_column="gender", labels=LABELS)
    fit_concept_erasure(model, batches, "no_gender", progress=False)
    model.save_pretrained(folder / "model" / "no_gender")
    return folder / "model"


@setup
def field_classifier(page: Page) -> None:
    """`field-classifier/`, trained on skewed rows, and `field-classifier/no_gender/`, an erasure of it."""
    shutil.copytree(_classifier(page), page.folder / "field-classifier")


@setup
def gender_feature(page: Page) -> None:
    """`gender/`: a GRADIEND adapter of `bert-base-uncased`."""
    if not (page.folder / "bert-base-uncased").exists():
        small_bert(page)
    if not (page.folder / "gender").exists():
        shutil.copytree(_gender(page), page.folder / "gender")


@setup
def forked_pythons(page: Page) -> None:
    """Run `python -c PROGRAM` in a process that has imported transformers, but not PEFT or this package."""

    def run(words: list[str], **_: Any) -> prepared.Ended:
        assert words[:2] == [sys.executable, "-c"] and len(words) == 3
        return prepared.run(prepared.run_code, words[2], folder=Path.cwd(), kind=prepared.TRANSFORMERS)

    page.substitute("subprocess.run", run)


# ---- the README, whose blocks are parts of longer programs -----------------------------------------------------------


@setup
def small_encoder(page: Page) -> None:
    """The small BERT in place of the demo's encoder, which would take half a minute for 2,500 sentences."""
    page.substitute("hf_erasure.recipes.embedded_model", lambda: str(_bert(page) / "model"))


@setup
def few_sentences(page: Page) -> None:
    """A tenth of the 2,500 sentences of the demo."""
    page.substitute(
        "hf_erasure.recipes.occupation_sentences",
        lambda: {split: rows.shuffle(seed=0).select(range(240)) for split, rows in occupation_sentences().items()},
    )


@setup
def readme_training(page: Page) -> None:
    """Like `training`, with the names that the block does not import."""
    training(page)
    page.namespace |= {"LoraConfig": peft.LoraConfig, "ConceptErasureCallback": ConceptErasureCallback}


@setup
def readme_guard(page: Page) -> None:
    """A causal model with an active feature, texts for `SFTTrainer`, and the names that the block does not import."""
    import trl

    from tests.ecosystem.test_trainer import sft_data, sft_tokenizer
    from tests.ecosystem.trainer_runs import fitted, options_for

    page.namespace |= {
        "model": fitted("guard", sticky=True), "rows": sft_data(), "GradiendCallback": GradiendCallback,
        "args": trl.SFTConfig(**options_for(page.folder / "sft", bf16=False, max_steps=4)),
        "SFTTrainer": functools.partial(trl.SFTTrainer, processing_class=sft_tokenizer()),
    }  # fmt: skip


@setup
def readme_two_concepts(page: Page) -> None:
    """A model with erasures `gender` and `pos`, batches labelled with each, and the function that is not imported."""
    erasing(page)
    model, one, other = page.namespace["model"], page.namespace["batches"], page.namespace["held_out"]
    for name, batches in (("gender", one), ("pos", other)):
        model.add_adapter(ConceptErasureConfig(concept=name, labels=LABELS), adapter_name=name)
        model.set_adapter(name)
        fit_concept_erasure(model, batches, name, sequential=False, progress=False)
    page.namespace |= {"one": one, "other": other, "combine_adapters": combine_adapters}


# ---- sharing ---------------------------------------------------------------------------------------------------------


@setup
def no_gender_model(page: Page) -> None:
    """`model` with a fitted erasure `no_gender`."""
    no_gender(page)
    model = hf.AutoModel.from_pretrained(_bert(page) / "model")
    model.load_adapter(str(page.folder / "no-gender"), adapter_name="no_gender")
    page.namespace["model"] = model


@setup
def pushed(page: Page) -> None:
    """`alice/bert-no-gender`: the saved folder, in the place to which a reader will have downloaded it."""
    shutil.copytree(page.folder / "no-gender", page.folder / "alice" / "bert-no-gender")
