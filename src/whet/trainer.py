"""The Python face of supervised fine-tuning: a configuration, a trainer, predictions, a chat.

trainer = SFTrainer(TrainingConfig(model_name="path/or/name", train_file="train.jsonl"))
trainer.train()
trainer.predict(["How are you?"])
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from whet.answer import answers
from whet.compose import Run, compose
from whet.config.loader import from_values
from whet.config.run import RunConfig
from whet.errors import ConfigError
from whet.keeper import Keeper
from whet.losses import Loss
from whet.methods import Term, check
from whet.models.load import check_model_folder, load_tokenizer
from whet.recipe import method_of
from whet.roles import Policy, load_policy
from whet.types import Message, Sampling

Result = TypeVar("Result")


class TrainingConfig(BaseModel):
    """Settings of supervised fine-tuning under the names that many know.

    Every other setting of `RunConfig` may be given as well, under its own name (`optim={"lr": 1e-5}`,
    `eval={"every_steps": 50}`) or under any accepted alias (`save_steps=100`).
    Raises ConfigError for names and values that are not accepted, all at once.
    """

    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=(), use_attribute_docstrings=True)

    experiment_name: str = "sft_experiment"
    """Name of the run; its files go to `runs/<name>` unless `output_dir` is given."""
    model_name: str = "Qwen/Qwen3-8B"
    """Folder or hub name of the model."""
    model_type: str | None = None
    """Family of the model; the model's own configuration decides, so this is only checked."""
    device: str | None = None
    """`cuda`, `cpu`, or None for what is there."""
    train_file: str | list[str] | None = None
    """Training rows. Without them the trainer only predicts and chats."""
    eval_file: str | list[str] | None = None
    """Held-out rows."""
    batch_size: int = 8
    learning_rate: float = 2e-5
    num_train_epochs: float = 3
    max_seq_length: int = 2048
    gradient_accumulation_steps: int = 1
    warmup_steps_ratio: float = 0.1
    weight_decay: float = 0.01
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    use_lora: bool = False
    lora_rank: int = 8
    lora_alpha: float = 32
    lora_dropout: float = 0.1
    lora_target_modules: str | list[str] = ["q_proj", "v_proj"]

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.run_config()  # says at once what is wrong

    def run_config(self) -> RunConfig:
        """The same settings as the rest of whet knows them."""
        given = {name: value for name, value in self.model_dump(exclude_unset=True).items() if value is not None}
        defaults = {name: value for name, value in self.model_dump().items() if value is not None and name not in given}
        for settings in (given, defaults):
            for name in [*settings]:
                if not self.use_lora and name.startswith("lora_"):
                    del settings[name]  # without an adapter its rank means nothing
        trains = self.train_file is not None or "data" in given
        return from_values(given, method="sft", where="TrainingConfig", trains=trains, defaults=defaults).config


class SFTrainer:
    """Fine-tunes a model on rows, evaluates it, and lets it answer.

    The data is read and checked, then the model loaded, when the trainer is made. `loss` takes the place of
    the method's own (see `whet.losses.create_loss`). `callbacks` are called with the trainer after each step.
    """

    def __init__(self, config: TrainingConfig | RunConfig, *, loss: Loss | None = None):
        self.config = config.run_config() if isinstance(config, TrainingConfig) else config
        self.callbacks: list[Callable[[SFTrainer], None]] = []
        self._run: Run | None = None
        if self.config.data.train is not None:
            method = method_of(self.config)
            if loss is not None:
                method = method.with_terms([Term("loss", loss, method.terms[0].weight)])
                check(method)
            self._run = compose(self.config, method)
            self._run.loop.callbacks.append(lambda _: self._call_back())
            self.policy: Policy = self._run.policy
        else:
            check_model_folder(self.config.model)
            tokenizer = load_tokenizer(self.config.model)
            self.policy = load_policy(self.config, method_of(self.config), tokenizer, train=False)

    @property
    def model(self) -> PreTrainedModel:
        """The model that is trained; `trainer.model.save_pretrained(folder)` works as ever."""
        return self.policy.backend.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.policy.tokenizer

    @property
    def global_step(self) -> int:
        """Steps done since the start of the run."""
        return self._run.loop.global_step if self._run else 0

    def train(self) -> dict[str, float]:
        """Train to the end. Returns the step reached and the last evaluation; checkpoints, metrics and the final
        model are in `output_dir`."""
        run = self._need_run("train", "train_file")
        metrics = _finish(run.train())
        return {"global_step": run.loop.global_step, **metrics}

    def evaluate(self) -> dict[str, float]:
        """Losses on the held-out rows, as `eval/…`."""
        run = self._need_run("evaluate", "train_file")
        if run.loop.evaluate is None:
            raise ConfigError("there are no held-out rows to evaluate on; set eval_file, or data.eval_share")
        return _finish(run.loop.evaluate(run.loop.progress.running))

    def predict(self, prompts: Sequence[str], *, max_new_tokens: int = 256, **sampling: Any) -> list[str]:
        """One answer per prompt. Greedy unless `temperature`, `top_p`, `top_k`, `stop` or `seed` say otherwise."""
        return _finish(answers(self.policy, list(prompts), _sampling(max_new_tokens, sampling)))

    def chat(self, messages: list[Message], *, max_new_tokens: int = 256, **sampling: Any) -> str:
        """The model's next turn in a conversation of `{"role": …, "content": …}` messages."""
        return _finish(answers(self.policy, [messages], _sampling(max_new_tokens, sampling)))[0]

    def load_from_checkpoint(self, path: str | Path) -> None:
        """Go to the state of a checkpoint: weights, optimizer, data position, progress. Raises CheckpointError."""
        run = self._need_run("load_from_checkpoint", "train_file")
        at = self.config.model_copy(
            update={"checkpoint": self.config.checkpoint.model_copy(update={"resume": str(path)})}
        )
        Keeper(at).restore(run.loop)

    def save_model(self, folder: str | Path) -> None:
        """Write weights, configuration and tokenizer for transformers (or peft, for an adapter)."""
        self.policy.backend.export_weights(Path(folder))

    def _call_back(self) -> None:
        for callback in self.callbacks:
            callback(self)

    def _need_run(self, what: str, setting: str) -> Run:
        if self._run is None:
            raise ConfigError(f"{what} needs training rows; set {setting} in the TrainingConfig")
        return self._run


def _sampling(max_new_tokens: int, options: dict[str, Any]) -> Sampling:
    try:
        return replace(Sampling(max_tokens=max_new_tokens, temperature=0.0), **options)
    except TypeError as error:
        raise ConfigError(f"{error}; sampling takes temperature, top_p, top_k, stop, stop_token_ids and seed") from None


def _finish(work: Coroutine[Any, Any, Result]) -> Result:
    """Run a coroutine to its end, also where an event loop is running already (a notebook)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    outcome: list[Result] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(asyncio.run(work))
        except BaseException as error:
            failure.append(error)

    # Autograd settings belong to a thread; a fresh one has PyTorch's defaults, as this one should have.
    thread = threading.Thread(target=run, name="whet")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return outcome[0]
