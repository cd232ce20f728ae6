"""A program that uses only LoRA, with or without `import hf_erasure`, and records all that can be observed.

`python lora_alone.py RESULT [plugin]` works in the current folder, and writes its record to the file RESULT. All of its
paths are relative, so that messages and files of two runs in two folders are the same.
"""

from __future__ import annotations

import sys

if sys.argv[2:] == ["plugin"]:
    import hf_erasure  # noqa: F401

import copy
import functools
import hashlib
import inspect
import json
import pickle
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.integrations.peft import PeftAdapterMixin

from tests.small_models import inputs_of, small_batch, small_model

# Printed to both streams after all imports, where the recorded part of the program begins.
BEGINS = "---- the program begins ----"
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
BERT = hf.BertConfig(**SIZES, vocab_size=64, max_position_embeddings=48, num_labels=2)


class Notes:
    """The record of a run.

    Attributes:
        seen: `"part: step"` → the digest of a tensor, or a text.
        warned: Part → the category, text and place of every warning.
    """

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {}
        self.warned: dict[str, list[list[str]]] = {}
        self.part = ""

    def note(self, step: str, value: Any) -> None:
        key = f"{self.part}: {step}"
        assert key not in self.seen, key
        self.seen[key] = _told(value)

    def tried(self, step: str, call: Callable[[], Any]) -> None:
        """Record the error that a call raises, or the tensor that it returns."""
        try:
            result = call()
        except Exception as error:
            self.note(step, f"{type(error).__name__}: {error}")
        else:
            self.note(step, result if isinstance(result, Tensor) else f"nothing raised: {type(result).__name__}")

    @contextmanager
    def within(self, part: str):
        self.part = part
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
        # The file that a warning names is recorded too, since a program's filters may depend on it.
        places = [Path(warning.filename).parts[-2:] for warning in caught]
        self.warned[part] = [
            [warning.category.__name__, str(warning.message), "/".join(place)]
            for warning, place in zip(caught, places, strict=True)
        ]


def _told(value: Any) -> Any:
    if isinstance(value, Tensor):
        data = value.detach().cpu().contiguous()
        plain = data.clone().reshape(-1).view(torch.uint8).numpy().tobytes()
        return f"{tuple(data.shape)} {data.dtype} {hashlib.sha256(plain).hexdigest()[:16]}"
    if isinstance(value, dict):
        return {str(key): _told(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_told(item) for item in (sorted(value) if isinstance(value, set) else value)]
    return value if isinstance(value, str | int | float | bool | None) else repr(value)


def llama() -> Any:
    return copy.deepcopy(small_model("llama"))


def lora(**fields: Any) -> LoraConfig:
    """A LoRA that acts as soon as it is added."""
    wanted = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    return LoraConfig(**{**wanted, **fields})


def output(model: nn.Module, name: str = "llama", **more: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs_of(small_batch(name, rows=4)), **more)[0]


def modes(model: nn.Module) -> dict[str, list[bool]]:
    """Which parameters train, which modules are in training mode, and which adapters are active in each layer."""
    layers = [module for module in model.modules() if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer)]
    return {
        "trains": [parameter.requires_grad for parameter in model.parameters()],
        "training": [module.training for module in model.modules()],
        "active": [str(layer.active_adapters) for layer in layers],
    }


# ---- the parts of the program ----------------------------------------------------------------------------------------


def mixin(notes: Notes) -> None:
    """Adapters on a transformers model."""
    model = llama()
    notes.note("plain", output(model))
    model.add_adapter(lora())
    notes.note("one", output(model))
    notes.note("modes of one", modes(model))
    model.add_adapter(lora(target_modules=["o_proj"], r=2), adapter_name="second")
    notes.note("second", output(model))
    model.set_adapter(["default", "second"])
    notes.note("both", output(model))
    notes.note("active", model.active_adapters())
    model.disable_adapters()
    notes.note("none", output(model))
    model.enable_adapters()
    notes.note("enabled", output(model))
    notes.note("modes of both", modes(model))
    notes.note("keys", list(model.get_adapter_state_dict("second")))
    model.set_adapter("default")
    model.save_pretrained("mixin one")
    other = llama()
    notes.note("loading", str(other.load_adapter("mixin one", adapter_name="loaded")))
    notes.note("loaded", output(other))
    notes.note("modes of loaded", modes(other))
    other.load_adapter("mixin one", adapter_name="trained", is_trainable=True)
    notes.note("modes of trainable", modes(other))
    tensors = {key: 2 * value for key, value in model.get_adapter_state_dict("default").items()}
    other.load_adapter(adapter_name="given", peft_config=lora(), adapter_state_dict=tensors)
    notes.note("given tensors", output(other))
    other.delete_adapter("trained")
    notes.note("deleted", output(other))
    notes.note("configurations", sorted(other.peft_config))
    other.set_adapter("loaded")
    notes.note("set again", output(other))
    other.save_pretrained("mixin another", selected_adapters=["loaded"])
    other.delete_adapter(["loaded", "given"])
    notes.note("all deleted", output(other))
    llama().save_pretrained("mixin base")
    read = hf.AutoModelForCausalLM.from_pretrained("mixin base")
    read.add_adapter(lora(modules_to_save=["lm_head"]), adapter_name="with_head")
    read.save_pretrained("mixin head")
    notes.note("with a head", output(read))
    again = hf.AutoModelForCausalLM.from_pretrained("mixin head")
    notes.note("read by its folder", output(again))
    notes.note("copied", output(copy.deepcopy(again)))
    notes.note("pickled", output(pickle.loads(pickle.dumps(again))))
    notes.note("state", dict(again.state_dict()))


def mixin_errors(notes: Notes) -> None:
    """Calls on a transformers model that cannot work."""
    model = llama()
    notes.tried("set without any", lambda: model.set_adapter("default"))
    notes.tried("enable without any", model.enable_adapters)
    notes.tried("delete without any", lambda: model.delete_adapter("default"))
    notes.tried("no configuration", lambda: model.add_adapter("lora"))
    notes.tried("no such module", lambda: model.add_adapter(lora(target_modules=["nothing"])))
    notes.note("after no such module", [output(model), modes(model), str(getattr(model, "peft_config", None))])
    notes.tried("saved after it", lambda: model.save_pretrained("mixin failed"))
    model = llama()
    model.add_adapter(lora())
    notes.tried("the same name", lambda: model.add_adapter(lora()))
    notes.tried("unknown name", lambda: model.set_adapter("other"))
    notes.tried("unknown name deleted", lambda: model.delete_adapter("other"))
    notes.tried("no folder", lambda: model.load_adapter("nowhere", adapter_name="other"))
    model.save_pretrained("mixin to load")
    notes.tried("a name in use", lambda: model.load_adapter("mixin to load"))
    config = json.loads(Path("mixin to load/adapter_config.json").read_text())
    Path("mixin wrong").mkdir()
    Path("mixin wrong/adapter_config.json").write_text(json.dumps({**config, "r": 2}))
    Path("mixin wrong/adapter_model.safetensors").write_bytes(
        Path("mixin to load/adapter_model.safetensors").read_bytes()
    )
    notes.tried("a wrong rank", lambda: model.load_adapter("mixin wrong", adapter_name="wrong"))
    notes.note("after a wrong rank", [modes(model), sorted(model.peft_config)])
    Path("mixin damaged").mkdir()
    Path("mixin damaged/adapter_config.json").write_text(json.dumps(config))
    Path("mixin damaged/adapter_model.safetensors").write_bytes(b"\x08")
    notes.tried("a damaged file", lambda: model.load_adapter("mixin damaged", adapter_name="damaged"))
    Path("mixin less").mkdir()
    Path("mixin less/adapter_config.json").write_text(json.dumps({**config, "target_modules": ["q_proj", "up_proj"]}))
    Path("mixin less/adapter_model.safetensors").write_bytes(
        Path("mixin to load/adapter_model.safetensors").read_bytes()
    )
    other = llama()
    torch.manual_seed(1)
    notes.tried("missing and unexpected keys", lambda: other.load_adapter("mixin less", adapter_name="less"))
    notes.note("after missing keys", output(other))


def peft_model(notes: Notes) -> None:
    """Adapters on a PeftModel."""
    model = get_peft_model(llama(), lora(task_type="CAUSAL_LM"))
    notes.note("one", output(model))
    notes.note("modes of one", modes(model))
    model.add_adapter("second", lora(r=2, target_modules=["up_proj"], task_type="CAUSAL_LM"))
    model.set_adapter("second")
    notes.note("second", output(model))
    notes.note("modes of second", modes(model))
    model.add_adapter("third", lora(task_type="CAUSAL_LM"))
    model.add_weighted_adapter(["default", "third"], [0.5, 2.0], "mixed", combination_type="linear")
    model.set_adapter("mixed")
    notes.note("weighted", output(model))
    names = ["default", "third", "__base__", "default"]
    notes.note("mixed batch", output(model.eval(), adapter_names=names))
    with model.disable_adapter():
        notes.note("disabled", output(model))
    model.base_model.set_adapter(["default", "second"])
    notes.note("both", output(model))
    model.merge_adapter()
    notes.note("merged", output(model))
    model.merge_adapter()
    model.unmerge_adapter()
    notes.note("unmerged", output(model))
    model.unmerge_adapter()
    model.save_pretrained("peft saved")
    model.save_pretrained("peft pickled", selected_adapters=["third"], safe_serialization=False)
    model.delete_adapter("mixed")
    notes.note("keys", list(peft.get_peft_model_state_dict(model, adapter_name="third")))
    read = PeftModel.from_pretrained(llama(), "peft saved")
    notes.note("read", output(read))
    notes.note("modes of read", modes(read))
    notes.note("loading", str(read.load_adapter("peft saved/second", adapter_name="second", is_trainable=True)))
    notes.note("loading once more", str(read.load_adapter("peft saved/second", adapter_name="second")))
    read.load_adapter("peft saved/third", adapter_name="third", low_cpu_mem_usage=True)
    read.set_adapter("third")
    notes.note("third", output(read))
    notes.note("modes of three", modes(read))
    read.delete_adapter("third")
    read.create_or_update_model_card("peft card")
    notes.note("merged and unloaded", output(read.merge_and_unload(safe_merge=True)))
    notes.note("unloaded", output(copy.deepcopy(model).unload()))
    merged = model.merge_and_unload(adapter_names=["default"])
    merged.save_pretrained("peft merged")
    notes.note("merged at last", output(merged))
    notes.note("a second time", output(get_peft_model(get_peft_model(llama(), lora()).base_model.model, lora())))
    llama().save_pretrained("peft base")
    based = get_peft_model(hf.AutoModelForCausalLM.from_pretrained("peft base"), lora(task_type="CAUSAL_LM"))
    based.save_pretrained("peft based")
    notes.note("by its folder", output(peft.AutoPeftModelForCausalLM.from_pretrained("peft based")))
    emptied = PeftModel.from_pretrained(llama(), "peft saved")
    emptied.delete_adapter("default")
    notes.note("loading into an emptied one", str(emptied.load_adapter("peft saved", "default")))
    notes.note("modes of an emptied one", modes(emptied))
    changed = copy.deepcopy(based)
    changed.load_state_dict(based.state_dict())
    notes.note("copied", output(changed))
    notes.note("pickled", output(pickle.loads(pickle.dumps(based))))
    several = get_peft_model(llama(), lora(task_type="CAUSAL_LM"), mixed=True)
    several.add_adapter("other", peft.LoHaConfig(r=2, target_modules=["up_proj"], init_weights=False))
    several.set_adapter(["default", "other"])
    notes.note("of two methods", output(several))


def peft_errors(notes: Notes) -> None:
    """Calls that cannot work on a PeftModel."""
    model = get_peft_model(llama(), lora(task_type="CAUSAL_LM"))
    notes.tried("no such module", lambda: get_peft_model(llama(), lora(target_modules=["nothing"])))
    notes.tried(
        "another method",
        lambda: model.add_adapter("ia3", peft.IA3Config(target_modules=["up_proj"], feedforward_modules=[])),
    )
    notes.tried("unknown name", lambda: model.set_adapter("other"))
    notes.tried("unknown name deleted", lambda: model.delete_adapter("other"))
    notes.tried("no folder", lambda: model.load_adapter("nowhere", "other"))
    notes.tried("no folder read", lambda: PeftModel.from_pretrained(llama(), "nowhere"))
    notes.tried("a file", lambda: model.save_pretrained("peft_file"))
    Path("a file").write_text("")
    notes.tried("a file in the way", lambda: model.save_pretrained("a file"))
    notes.tried("a wrong selection", lambda: model.save_pretrained("peft wrong", selected_adapters=["other"]))
    for name, change in {"rank": {"r": 2}, "targets": {"target_modules": ["q_proj", "up_proj"]}}.items():
        config = json.loads(Path("peft_file/adapter_config.json").read_text())
        folder = Path(f"peft wrong {name}")
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps({**config, **change}))
        (folder / "adapter_model.safetensors").write_bytes(Path("peft_file/adapter_model.safetensors").read_bytes())
        torch.manual_seed(1)
        notes.tried(f"wrong {name}", lambda folder=folder: model.load_adapter(str(folder), "wrong"))
        torch.manual_seed(1)
        notes.tried(f"wrong {name} read", lambda folder=folder: PeftModel.from_pretrained(llama(), str(folder)))
        notes.note(f"after wrong {name}", [modes(model), sorted(model.peft_config), output(model)])
    notes.tried("another kind", lambda: get_peft_model(nn.Linear(2, 2), lora(task_type="CAUSAL_LM")))


def heads(notes: Notes) -> None:
    """The classes of PEFT for every task, some of which train a head as well."""
    kinds = {
        "TOKEN_CLS": hf.BertForTokenClassification,
        "SEQ_CLS": hf.BertForSequenceClassification,
        "QUESTION_ANS": hf.BertForQuestionAnswering,
        "FEATURE_EXTRACTION": hf.BertModel,
    }
    for task, kind in kinds.items():
        torch.manual_seed(0)
        base = kind(BERT).eval()
        config = lora(task_type=task, target_modules=["query"])
        model = get_peft_model(copy.deepcopy(base), config)
        notes.note(f"{task}", output(model, "bert"))
        notes.note(f"{task} modes", modes(model))
        notes.note(f"{task} configuration", json.dumps(_plain(config.to_dict()), sort_keys=True))
        model.add_adapter("second", lora(task_type=task, target_modules=["value"]))
        model.set_adapter("second")
        notes.note(f"{task} second", output(model, "bert"))
        model.save_pretrained(f"head {task}")
        read = PeftModel.from_pretrained(copy.deepcopy(base), f"head {task}")
        read.load_adapter(f"head {task}/second", "second")
        read.set_adapter("second")
        notes.note(f"{task} read", output(read, "bert"))
        read.delete_adapter("second")
        notes.note(f"{task} deleted", [output(read, "bert"), modes(read)])
        notes.note(f"{task} merged", output(read.merge_and_unload(), "bert"))
    translating = get_peft_model(copy.deepcopy(small_model("t5")), lora(task_type="SEQ_2_SEQ_LM", target_modules=["q"]))
    notes.note("SEQ_2_SEQ_LM", output(translating, "t5"))
    translating.save_pretrained("head SEQ_2_SEQ_LM")
    extra = lora(target_modules=["q_proj"], trainable_token_indices=[1, 2], modules_to_save=["lm_head"])
    model = get_peft_model(llama(), extra)
    notes.note("trained tokens", [output(model), modes(model)])
    model.save_pretrained("head tokens")
    notes.note("trained tokens read", output(PeftModel.from_pretrained(llama(), "head tokens")))


def _plain(value: Any) -> Any:
    return (
        sorted(value)
        if isinstance(value, set)
        else {k: _plain(v) for k, v in value.items()}
        if isinstance(value, dict)
        else value
    )


def otherwise(notes: Notes) -> None:
    """Models that are made in inference mode and with another default dtype."""
    made: dict[str, Any] = {}

    def through_transformers() -> None:
        made["mixin"] = llama()
        made["mixin"].add_adapter(lora())

    def through_peft() -> None:
        made["peft"] = get_peft_model(llama(), lora(task_type="CAUSAL_LM"))
        made["peft"].add_adapter("second", lora(task_type="CAUSAL_LM"))

    with torch.inference_mode():
        notes.tried("transformers in inference mode", through_transformers)
        notes.tried("PEFT in inference mode", through_peft)
    for name, model in made.items():
        notes.note(f"{name} made in inference mode", [parameter.is_inference() for parameter in model.parameters()])
    torch.set_default_dtype(torch.float64)
    try:
        model = llama()
        model.add_adapter(lora())
        notes.note("made with float64", [str(parameter.dtype) for parameter in model.parameters()])
    finally:
        torch.set_default_dtype(torch.float32)


def spread(notes: Notes) -> None:
    """A model with one block on disk."""
    llama().save_pretrained("spread base")
    get_peft_model(llama(), lora(task_type="CAUSAL_LM")).save_pretrained("spread adapter")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    places |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}

    def base(folder: str) -> Any:
        return hf.AutoModelForCausalLM.from_pretrained("spread base", device_map=places, offload_folder=folder)

    read = base("spread 1")
    notes.tried("loaded by transformers", lambda: read.load_adapter("spread adapter"))
    # Its outputs are not recorded: the adapter's part for the block on disk is not loaded, so they differ in each run.
    notes.note("devices by transformers", str(getattr(read, "hf_device_map", None)))
    placed = {"device_map": places, "offload_folder": "spread 2"}
    notes.tried("read by PEFT", lambda: PeftModel.from_pretrained(base("spread 3"), "spread adapter", **placed))
    whole = get_peft_model(base("spread 4"), lora(task_type="CAUSAL_LM", target_modules=["up_proj"]))
    notes.tried("by PEFT", lambda: output(whole))
    notes.note("devices", str(getattr(whole, "hf_device_map", None)))
    notes.tried("added", lambda: whole.add_adapter("more", lora(task_type="CAUSAL_LM", target_modules=["o_proj"])))
    notes.tried("saved", lambda: whole.save_pretrained("spread saved"))
    notes.tried("merged by PEFT", lambda: output(whole.merge_and_unload()))


def experts(notes: Notes) -> None:
    """Weights whose names in transformers differ from those in its files, and a LoRA on parameters."""
    sizes = {**SIZES, "vocab_size": 64, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 2}
    torch.manual_seed(0)
    base = hf.MixtralForCausalLM(hf.MixtralConfig(**sizes, pad_token_id=0)).eval()
    for name, config in {
        "modules": lora(target_modules=["q_proj"]),
        "parameters": lora(target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"]),
        "old names": lora(target_modules=["q_proj", "w1", "w3"]),
    }.items():
        for way in ("transformers", "PEFT"):
            torch.manual_seed(0)
            model = copy.deepcopy(base)
            if way == "PEFT":
                call = functools.partial(get_peft_model, model, copy.deepcopy(config))
            else:
                call = functools.partial(model.add_adapter, copy.deepcopy(config))
            notes.tried(f"{name} {way}", call)
            notes.note(f"{name} {way} keys", [key for key, _ in model.named_parameters() if "lora" in key])
            notes.tried(f"{name} {way} output", functools.partial(output, model))
            if way == "transformers":
                notes.tried(f"{name} saved", functools.partial(model.save_pretrained, f"experts {name}"))
                other = copy.deepcopy(base)
                notes.tried(f"{name} loaded", functools.partial(other.load_adapter, f"experts {name}"))
                notes.tried(f"{name} loaded output", functools.partial(output, other))
                last = copy.deepcopy(base)
                read = functools.partial(PeftModel.from_pretrained, last, f"experts {name}")
                notes.tried(f"{name} read by PEFT", read)
                notes.tried(f"{name} read output", functools.partial(output, last))


class Texts(torch.utils.data.Dataset):
    def __init__(self, seed: int) -> None:
        batch = inputs_of(small_batch("llama", seed=seed, rows=8))
        self.rows = [
            {**{key: value[row] for key, value in batch.items()}, "labels": batch["input_ids"][row]} for row in range(8)
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.rows[index]


def training(notes: Notes) -> None:
    """Two steps of Trainer, saved, stopped and resumed, on a PeftModel and on a transformers model."""
    for way in ("peft", "mixin"):
        for run in ("whole", "resumed", "best"):
            torch.manual_seed(0)
            model = llama()
            if way == "peft":
                model = get_peft_model(model, lora(task_type="CAUSAL_LM"))
            else:
                model.add_adapter(lora())
            folder = f"trainer {way} {run}"
            arguments = hf.TrainingArguments(
                folder,
                max_steps=2,
                per_device_train_batch_size=4,
                save_steps=1,
                eval_steps=1,
                eval_strategy="steps",
                logging_steps=1,
                load_best_model_at_end=run == "best",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                save_total_limit=3,
            )
            trainer = hf.Trainer(model, arguments, train_dataset=Texts(1), eval_dataset=Texts(2))
            start = f"trainer {way} whole/checkpoint-1" if run == "resumed" else None
            # Some releases of transformers cannot resume a model with an adapter that is not a PeftModel.
            notes.tried(f"{way} {run} trained", functools.partial(trainer.train, resume_from_checkpoint=start))
            notes.note(f"{way} {run}", [output(trainer.model.eval()), modes(trainer.model)])
            notes.note(f"{way} {run} log", [_timeless(row) for row in trainer.state.log_history])
            trainer.save_model(f"{folder} saved")
            notes.tried(f"{way} {run} card", trainer.create_model_card)
            trainer.save_state()


def _timeless(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if not key.endswith(("_runtime", "_per_second"))}


def signatures(notes: Notes) -> None:
    """The signatures and docstrings of the functions that a program calls."""
    for owner in (
        PeftAdapterMixin,
        PeftModel,
        peft.PeftModelForCausalLM,
        peft.tuners.tuners_utils.BaseTuner,
        hf.Trainer,
    ):
        for name in sorted(vars(owner)):
            member = inspect.getattr_static(owner, name)
            function = member.__func__ if isinstance(member, classmethod | staticmethod) else member
            if inspect.isfunction(function):
                told = [
                    str(inspect.signature(function)),
                    function.__module__,
                    function.__qualname__,
                    function.__doc__ or "",
                ]
                notes.note(f"{owner.__name__}.{name}", [type(member).__name__, *told])


PARTS = (mixin, mixin_errors, peft_model, peft_errors, heads, otherwise, spread, experts, training, signatures)


def files() -> dict[str, str]:
    """The digest of every file that was written, without the times that Trainer measured."""
    found = {}
    for path in sorted(path for path in Path().rglob("*") if path.is_file()):
        content = path.read_bytes()
        if path.name in ("trainer_state.json", "all_results.json"):
            state = json.loads(content)
            state["log_history"] = [_timeless(row) for row in state["log_history"]]
            content = json.dumps(state).encode()
        found[path.as_posix()] = hashlib.sha256(content).hexdigest()[:16]
    return found


def main(result: Path) -> None:
    torch.set_num_threads(1)
    notes = Notes()
    for stream in (sys.stdout, sys.stderr):
        print(BEGINS, file=stream, flush=True)
    for part in PARTS:
        hf.set_seed(0)
        with notes.within(part.__name__):
            part(notes)
        print(f"---- {part.__name__} ----", file=sys.stderr, flush=True)
    result.write_text(json.dumps({"seen": notes.seen, "warned": notes.warned, "files": files()}), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
