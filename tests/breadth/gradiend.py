"""The life of a GRADIEND adapter on a model of any type: attached, trained, steered, saved, loaded, merged, deleted."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import transformers as hf
from datasets import Dataset
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel

from hf_erasure import GradiendAdapter, GradiendConfig, GradiendTrainer, GradiendTrainingArguments
from hf_erasure.adapters import set_features, targeted_parameters
from hf_erasure.gradiend import Feature, FeatureDecoder, FeatureEncoder
from tests.breadth.life import Life
from tests.breadth.outcomes import Outcomes, WrongError, apart, different, same

COLUMN = "GRADIEND"
NAME, CLASSES = "feature", ["female", "male"]
_SPECIAL = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", "[MASK]", "[CLS]", "[SEP]"]
_SENTINELS = ["<extra_id_0>", "<extra_id_1>"]
_PLACE = "[FEATURE]"
_TEMPLATES = f"{{}} said that {_PLACE} was late today .", f"{{}} went to the park because {_PLACE} was happy ."
_NEUTRAL = ["rain fell on the hill .", "a bird sang today ."]
# Names and pronouns of both classes.
_WOMEN, _MEN = (["anna", "mary", "lily"], "she"), (["tom", "ben", "john"], "he")
# Learning rates for steering, tried until outputs move, since weights of models differ in size.
_RATES = (0.1, 1.0, 10.0, 1e3, 1e5)
# The least movement of outputs: many times the rounding of float32.
_MOVED = 1e-3
# The least correlation with the class of the encoder's values on four of the pairs that it was fitted on.
_CORRELATED = 0.8


class Gradiend(Life):
    """The steps of a GRADIEND's life on one model."""

    name = NAME

    def __init__(self, base: PreTrainedModel, folder: Path, has_head: bool, needs_sentinels: bool) -> None:
        super().__init__(base, folder, 78)
        self._has_head, self._needs_sentinels = has_head, needs_sentinels
        self._trainer: GradiendTrainer | None = None

    def live(self) -> Outcomes:
        """Run all steps."""
        step = self.outcomes.step
        step("attach", self._attach)
        step("train", self._train if self._has_head else self._draw, "attach")
        if self._has_head:
            step("evaluate", self._evaluate, "train")
        step("steer", self._steer, "train")
        step("reload", self._reload, "steer")
        step("disable", self._disable, "steer")
        step("PEFT and merge", self._merge, "reload")
        step("delete", self._delete, "steer")
        return self.outcomes

    def _attach(self) -> None:
        config = GradiendConfig(feature="gender", classes=CLASSES, density=0.2, keep_encoder=True)
        self._model.add_adapter(config, adapter_name=NAME)
        same(self._outputs(self._model), self._before, "unfitted")

    def _train(self) -> None:
        arguments = GradiendTrainingArguments(
            output_dir=str(self.folder / "training"),
            estimator="closed_form",
            per_device_train_batch_size=1,
            disable_tqdm=True,
            report_to=[],
            save_strategy="no",
        )
        pairs = _pairs()
        self._trainer = GradiendTrainer(
            self._model,
            args=arguments,
            train_dataset=pairs,
            eval_dataset=pairs.select([0, 1, 3, 4]),
            neutral_dataset=Dataset.from_dict({"text": _NEUTRAL}),
            tokenizer=_tokenizer(self._needs_sentinels),
            adapter_name=NAME,
        )
        self._trainer.train()
        same(self._outputs(self._model), self._before, "trained, and not steered")

    def _draw(self) -> None:
        """Set a random feature, since a model that does not predict words cannot be trained on."""
        noise = torch.Generator().manual_seed(0)
        shapes = {name: value.shape for name, value in targeted_parameters(self._model, NAME).items()}
        weights = {name: torch.randn(shape.numel(), generator=noise) for name, shape in shapes.items()}
        everywhere = dict.fromkeys(shapes)
        zeros = {name: torch.zeros_like(value) for name, value in weights.items()}
        decoder = FeatureDecoder(weights, zeros, everywhere, shapes)
        set_features(
            self._model, NAME, [Feature(FeatureEncoder(weights, everywhere, shapes), decoder)], [tuple(CLASSES)]
        )

    def _evaluate(self) -> None:
        found = self._trainer.evaluate()["cor"]
        if not found > _CORRELATED:
            raise WrongError(f"the correlation with the class on pairs that it was trained on is {found:.2f}")

    def _steer(self) -> None:
        for rate in _RATES:
            GradiendAdapter.of(self._model, NAME).steer(feature_factor=1.0, learning_rate=rate)
            self._after = self._outputs(self._model)
            if apart(self._after, self._before) > _MOVED:
                break
        different(self._after, self._before, "steered")

    def _merge(self) -> None:
        get_peft_model(copy.deepcopy(self.base), GradiendConfig(classes=CLASSES))
        wrapped = PeftModel.from_pretrained(copy.deepcopy(self.base), self.folder).eval()
        same(self._outputs(wrapped.get_base_model()), self._after, "as a PeftModel")
        # Merged weights are rounded once.
        same(self._outputs(wrapped.merge_and_unload()), self._after, "merged", 1e-5)


def _pairs() -> Dataset:
    """Sentences with a name, the pronoun of its class, and the pronoun of the other class."""
    classes = [(*_WOMEN, _MEN[1], CLASSES[0]), (*_MEN, _WOMEN[1], CLASSES[1])]
    rows = [
        {"text": template.format(name), "factual": own, "counterfactual": other, "label": label}
        for template in _TEMPLATES
        for names, own, other, label in classes
        for name in names
    ]
    return Dataset.from_list(rows)


def _tokenizer(needs_sentinels: bool) -> hf.PreTrainedTokenizerFast:
    names = [*_WOMEN[0], _WOMEN[1], *_MEN[0], _MEN[1]]
    words = " ".join([*names, *_TEMPLATES, *_NEUTRAL]).replace("{}", "").replace(_PLACE, "").split()
    known = [*_SPECIAL, *(_SENTINELS if needs_sentinels else []), *dict.fromkeys(words)]
    level = models.WordLevel({word: place for place, word in enumerate(known)}, unk_token="[UNK]")
    tokenizer = Tokenizer(level)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {f"{word.strip('[]').lower()}_token": word for word in _SPECIAL}
    return hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special, model_max_length=64)
