"""What a `GradiendTrainer` is told."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments

from ..processes import share_the_cpu

ESTIMATORS = ("closed_form", "trained")
ACTIVATIONS = ("tanh", "identity")


@dataclass
class GradiendTrainingArguments(TrainingArguments):
    """`TrainingArguments` with what the feature neuron adds to them.

    Of the fields of `TrainingArguments` these are used: the output folder, the batch sizes, the learning rate, weight
    decay and betas of AdamW, the number of epochs or steps, the steps between logs, evaluations and checkpoints, the
    number of checkpoints kept, the seed and the progress bar. The loss of the language model is never minimised, so
    schedulers, precision of training and the like have no meaning here.

    Args:
        estimator: `"closed_form"` takes one pass over the pairs and has nothing to tune; `"trained"` is the paper's
            encoder-decoder, trained by AdamW.
        activation: Of the trained feature neuron: `"tanh"` (the paper's) or `"identity"`.
        seeds: The trained estimator is started from so many seeds, `seed`, `seed + 1`, …; the best by correlation is
            kept.
        convergence: A start has converged when the absolute correlation on the evaluation data gets this far. None of
            them doing so is warned of.
        mask_draws: Where a masked or an encoder-decoder model's language modelling is scored, it reads every neutral
            text so often, each time with other tokens masked: more draws make the cost of an edit less noisy.
        low_memory: The closed form does not hold a gradient whole: four vectors of the size of the targeted weights in
            all, and not five, for one more backward pass a batch.
        patience: Stop a start when so many evaluations in a row did not improve its correlation; never when `None`.
    """

    per_device_train_batch_size: int = field(default=8, metadata={"help": "Pairs of one class in one gradient."})
    learning_rate: float = field(default=1e-5, metadata={"help": "Of the trained estimator."})
    logging_steps: float = field(default=50, metadata={"help": "Steps between two logs of loss and correlation."})
    eval_strategy: str = field(default="steps", metadata={"help": "As in TrainingArguments."})
    eval_steps: float | None = field(default=100, metadata={"help": "Steps between two evaluations."})
    report_to: str | list[str] | None = field(default="none", metadata={"help": "As in TrainingArguments."})
    estimator: str = field(default="closed_form", metadata={"help": "'closed_form' or 'trained'."})
    activation: str = field(default="tanh", metadata={"help": "'tanh' or 'identity', of the trained estimator."})
    seeds: int = field(default=1, metadata={"help": "Starts of the trained estimator."})
    convergence: float = field(default=0.5, metadata={"help": "Correlation from which a start has converged."})
    low_memory: bool = field(default=False, metadata={"help": "Hold no whole gradient, for one more backward."})
    mask_draws: int = field(default=1, metadata={"help": "Draws of masked tokens in a neutral text."})
    patience: int | None = field(default=None, metadata={"help": "Evaluations without improvement before stopping."})

    def __post_init__(self) -> None:
        if share_the_cpu():
            self.use_cpu = True  # else each process would take itself for the only one
        super().__post_init__()
        for name, choices in (("estimator", ESTIMATORS), ("activation", ACTIVATIONS)):
            if getattr(self, name) not in choices:
                known = ", ".join(map(repr, choices))
                raise ValueError(f"{name}={getattr(self, name)!r} is not known; choose one of {known}.")
        if self.seeds < 1:
            raise ValueError(f"seeds={self.seeds}: at least one start is needed.")
        if self.mask_draws < 1:
            raise ValueError(f"mask_draws={self.mask_draws}: at least one draw is needed.")
        if not 0 <= self.convergence <= 1:
            raise ValueError(f"convergence={self.convergence} is a correlation: give a number between 0 and 1.")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience={self.patience}: give a positive number, or None to go on to the end.")
