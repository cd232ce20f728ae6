"""Pushes adapters of both kinds in every possible way, and saves what their models compute.

The environment names a Hub.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import transformers as hf
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, ModelCard
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from hf_erasure.cli import app
from tests.adapters import lifecycle as erasures
from tests.adapters.gradiend import lifecycle as gradiends
from tests.fitting.gradiend.language_models import tokenizer_of
from tests.hub.clients import OWNER, report
from tests.hub.plan import BASE, BRANCH, FIRST, KINDS, NAME, NOTE, PROPOSED, SECOND, base, logits
from tests.small_models import small_batch, small_model

# A linear eraser at the norms merges into this model exactly, and becomes a LoRA at its linear layers.
CELL = erasures.Cell("llama", "all-linear", "output", affine=False)


def fitted(kind: str, seed: int) -> Any:
    """The base with an adapter that acts."""
    model = base()
    if kind == "erasure":
        model.add_adapter(erasures.config_of(CELL), adapter_name=NAME)
        erasures.fit(model, CELL.architecture, NAME, 100 * seed)
    else:
        model.add_adapter(gradiends.config_of(), adapter_name=NAME)
        gradiends.fit(model, NAME, seed)
    return model.eval()


class Pushes:
    """The pushes of one kind.

    Attributes:
        computed: The logits of each pushed model.
        commits: The client's answer to each push.
    """

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.folder = kind, folder / kind
        self.computed: dict[str, Tensor] = {}
        self.commits: dict[str, dict[str, Any]] = {}

    def repository(self, way: str) -> str:
        return f"{OWNER}/{self.kind}-{way}"

    def everything(self) -> None:
        self.from_added()
        self.from_wrapped()
        self.from_trainer()
        self.from_command()

    def from_added(self) -> None:
        """`model.push_to_hub` after `model.add_adapter`."""
        name = self.repository("added")
        places: dict[int, dict[str, Any]] = {BRANCH: {"revision": "dev"}, PROPOSED: {"create_pr": True}}
        for seed in (FIRST, SECOND, BRANCH, PROPOSED):
            model = fitted(self.kind, seed)
            self.enter(f"added {seed}", model.push_to_hub(name, commit_message=f"fit {seed}", **places.get(seed, {})))
            self.computed[f"added {seed}"] = logits(model)
        model = fitted(self.kind, FIRST)
        self.enter("private", model.push_to_hub(self.repository("private"), private=True))
        self.computed["private"] = logits(model)
        # The other ways start from this folder.
        model.save_pretrained(self.folder)

    def from_wrapped(self) -> None:
        """`PeftModel.push_to_hub`, into a new repository and into an existing one."""
        model = peft.PeftModel.from_pretrained(base(), self.folder)
        self.computed["wrapped"] = logits(model)
        self.enter("wrapped new", model.push_to_hub(self.repository("wrapped")))
        # Someone edits the card on the site.
        note = CommitOperationAdd("README.md", f"{ModelCard.load(self.repository('wrapped'))}\n{NOTE}\n".encode())
        HfApi().create_commit(self.repository("wrapped"), [note], commit_message="A note")
        self.enter("wrapped", fitted(self.kind, SECOND).push_to_hub(self.repository("wrapped")))
        self.enter("wrapped again", model.push_to_hub(self.repository("wrapped")))
        self.enter("wrapped branch", model.push_to_hub(self.repository("wrapped"), revision="dev", private=True))
        # PEFT saves an adapter with a name of its own in a folder of that name.
        named = peft.PeftModel.from_pretrained(base(), self.folder, adapter_name=NAME)
        self.enter("named", named.push_to_hub(self.repository("named")))

    def from_trainer(self) -> None:
        """`Trainer.push_to_hub`, and the pushes that a training makes with every checkpoint."""
        model = fitted(self.kind, FIRST)
        self.enter("trainer", self.trainer("trainer", model).push_to_hub())
        self.computed["trainer"] = logits(model)
        # The training does not change the adapter, and saves nothing else.
        trainer = self.trainer("trained", model.requires_grad_(True), hub_strategy="every_save", save_steps=1)
        trainer.train()
        self.enter("trained", trainer.push_to_hub())

    def trainer(self, way: str, model: Any, **options: Any) -> hf.Trainer:
        arguments = hf.TrainingArguments(
            output_dir=str(self.folder.with_name(f"{self.kind}-{way}")),
            push_to_hub=True,
            hub_model_id=self.repository(way),
            hub_private_repo=True,
            max_steps=2,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            **options,
        )
        ids = small_batch("llama")["input_ids"].tolist()
        return hf.Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids])

    def from_command(self) -> None:
        """`hf-erasure push`, `merge --push` and `export-lora --push`."""
        name, folder = self.repository("command"), str(self.folder)
        self.command("push", "push", folder, name, "--private", "--message", "By command")
        self.command("branch", "push", folder, name, "--revision", "dev", "--subfolder", "one")
        self.command("pull request", "push", folder, name, "--create-pr", "--subfolder", "other")
        merged, lora = (self.folder.with_name(f"{self.kind}-{name}") for name in ("merged", "lora"))
        shards = ["--max-shard-size", "40KB"] if self.kind == "erasure" else []
        self.command("merged", "merge", BASE, folder, str(merged), *shards, "--push", self.repository("merged"))
        self.computed["merged"] = logits(hf.AutoModelForCausalLM.from_pretrained(merged))
        if self.kind == "erasure":
            self.command("lora", "export-lora", BASE, folder, str(lora), "--push", self.repository("lora"))
            self.computed["lora"] = logits(peft.PeftModel.from_pretrained(base(), lora))

    def command(self, what: str, *arguments: str) -> None:
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, f"{done.output}\n{done.exception!r}"
        self.commits[what] = {"said": done.output}

    def enter(self, what: str, info: CommitInfo) -> None:
        self.commits[what] = {"oid": info.oid, "pull request": info.pr_revision}


def main(folder: Path) -> None:
    small_model("llama").push_to_hub(BASE)
    tokenizer_of("llama").push_to_hub(BASE)
    computed, commits = {"base": logits(base())}, {}
    for kind in KINDS:
        pushes = Pushes(kind, folder)
        pushes.everything()
        computed |= {f"{kind} {what}": value for what, value in pushes.computed.items()}
        commits[kind] = pushes.commits
    save_file(computed, folder / "computed.safetensors")
    report(__file__, folder, commits)
