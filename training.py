"""What both training stages share: one `Run` that steps, averages, validates, logs, saves and resumes.

Every random draw is a function of (seed, step), so N steps, a checkpoint and N more are bit-equal to 2 N steps.
In the folder of a run: NAME.safetensors (the best averaged weights, all that inference needs), NAME_last.pt (everything
that --resume needs), tensorboard/.
"""

import math
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ChainedScheduler, LinearLR, LRScheduler, MultiStepLR
from torch.optim.swa_utils import AveragedModel
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from config import TrainingConfig
from models.base import read_weights, replace_file, save_weights
from utils import log, mix


class NotFiniteError(FloatingPointError):
    """A loss or a gradient became NaN or infinite; checkpoints written before are intact."""


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """Exponential moving average of `model`'s parameters and buffers; the decay grows as (1 + t) / (10 + t)."""

    @torch.no_grad()
    def average(averages: list[Tensor], currents: list[Tensor], count: Tensor) -> None:
        rate = 1 - min(decay, (1 + int(count)) / (10 + int(count)))
        for mean, current in zip(averages, currents, strict=True):
            mean.lerp_(current, rate) if mean.is_floating_point() else mean.copy_(current)

    return AveragedModel(model, multi_avg_fn=average, use_buffers=True).requires_grad_(False).eval()


def start_from(model: nn.Module, path: str) -> None:
    """Copies the weights file `path` into `model`. Raises ValueError where it does not fit."""
    try:
        model.load_state_dict(read_weights(path)[0])
    except RuntimeError as error:
        raise ValueError(f"{path}: does not fit this {type(model).__name__}: {error}") from error


def learning_rates(optimizer: torch.optim.Optimizer, settings: TrainingConfig, per_epoch: int) -> LRScheduler:
    """MultiStepLR with an optional linear warm-up, counted in steps of the optimizer."""
    milestones = [round(epoch * per_epoch) for epoch in settings.milestones]
    schedulers: list[LRScheduler] = [MultiStepLR(optimizer, milestones, settings.gamma)]
    if warmup := round(settings.warmup * per_epoch):
        schedulers.append(LinearLR(optimizer, 1 / warmup, total_iters=warmup - 1))
    return ChainedScheduler(schedulers)


def apply_gradients(loss: Tensor, optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor], clip: float) -> None:
    """One step of `optimizer` on gradients already there. Raises NotFiniteError before it touches a weight."""
    norm = nn.utils.clip_grad_norm_(parameters, clip or math.inf)
    if not (torch.isfinite(loss) and torch.isfinite(norm)):
        raise NotFiniteError(f"loss {loss.item()}, norm of the gradient {norm.item()}")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


class Run:
    """The training of `model` on `examples` images.

    `update(step, indices) -> losses` does one step of the optimizers on those examples and returns detached scalars;
    `validate(model) -> figures` looks at the averaged model; its figure `score` (lower is better) picks the best.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        settings: TrainingConfig,
        examples: int,
        model: nn.Module,
        optimizers: dict[str, torch.optim.Optimizer],
        modules: dict[str, nn.Module] | None = None,
        notes: dict[str, str] | None = None,
    ):
        self.name, self.folder, self.settings, self.examples, self.model = name, folder, settings, examples, model
        self.batch = min(settings.batch_size, examples)
        self.per_epoch = examples // self.batch
        self.steps = max(1, round(settings.epochs * self.per_epoch))
        self.ema = averaged(model, settings.ema)
        self.schedulers = {key: learning_rates(opt, settings, self.per_epoch) for key, opt in optimizers.items()}
        self.stateful = {"model": model, "ema": self.ema, **(modules or {})}
        self.stateful |= {f"optimizer_{key}": opt for key, opt in optimizers.items()}
        self.stateful |= {f"scheduler_{key}": scheduler for key, scheduler in self.schedulers.items()}
        self.notes = notes or {}  # further metadata of the weights file
        self.step, self.best = 0, math.inf

    @property
    def checkpoint(self) -> Path:
        return self.folder / f"{self.name}_last.pt"

    @property
    def weights(self) -> Path:
        return self.folder / f"{self.name}.safetensors"

    def save(self) -> None:
        state = {"step": self.step, "best": self.best, "steps_an_epoch": self.per_epoch}
        state |= {key: thing.state_dict() for key, thing in self.stateful.items()}
        replace_file(self.checkpoint, lambda path: torch.save(state, path))

    def resume(self) -> None:
        """Takes up the last checkpoint. Raises FileNotFoundError, or ValueError where it is of another run."""
        if not self.checkpoint.is_file():
            raise FileNotFoundError(f"{self.checkpoint}: nothing to resume from")
        try:
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
            raise ValueError(f"{self.checkpoint}: not a checkpoint ({error})") from error
        if state["steps_an_epoch"] != self.per_epoch:
            raise ValueError(
                f"{self.checkpoint}: {state['steps_an_epoch']} steps an epoch, now {self.per_epoch}: "
                "other data or another batch size"
            )
        try:
            for key, thing in self.stateful.items():
                thing.load_state_dict(state[key])
        except (KeyError, ValueError, RuntimeError) as error:
            raise ValueError(f"{self.checkpoint}: does not fit this config: {error}") from error
        self.step, self.best = state["step"], state["best"]
        log.info(f"resumed {self.checkpoint} at step {self.step} of {self.steps}")

    def indices(self, step: int) -> Tensor:
        """The examples of a step: a slice of the epoch's permutation."""
        generator = torch.Generator().manual_seed(mix(self.settings.seed, 1, step // self.per_epoch))
        start = (step % self.per_epoch) * self.batch
        return torch.randperm(self.examples, generator=generator)[start : start + self.batch]

    def fit(self, update: Callable[[int, Tensor], dict[str, Tensor]], validate: Callable[[nn.Module], dict]) -> None:
        """Trains up to the last step. Raises NotFiniteError, the last good checkpoint intact."""
        every = max(1, round(self.settings.validate_every * self.per_epoch))
        folder = self.folder / "tensorboard" / self.name
        with SummaryWriter(folder, purge_step=self.step + 1) as writer:  # a resumed run keeps what was logged so far
            bar = tqdm(total=self.steps, initial=self.step, desc=self.name, unit="step", mininterval=1.0)
            while self.step < self.steps:
                torch.manual_seed(mix(self.settings.seed, 2, self.step))
                self.model.train()
                try:
                    losses = update(self.step, self.indices(self.step))
                except NotFiniteError as error:
                    last = self.checkpoint if self.checkpoint.is_file() else "none yet"
                    raise NotFiniteError(f"step {self.step}: {error}; last good checkpoint: {last}") from error
                for scheduler in self.schedulers.values():
                    scheduler.step()
                self.ema.update_parameters(self.model)
                self.step += 1
                bar.update()
                done = self.step == self.steps
                if self.step % 20 == 0 or done:
                    self._log(writer, "train", losses)
                    bar.set_postfix({key: f"{float(value):.4g}" for key, value in losses.items()}, refresh=False)
                if self.step % every == 0 or done:
                    self._validate(writer, validate)
                if self.step % self.settings.save_every == 0 or done:
                    self.save()
            bar.close()

    def _log(self, writer: SummaryWriter, group: str, values: dict) -> None:
        for key, value in values.items():
            if isinstance(value, Tensor) and value.ndim == 3:
                writer.add_image(f"{group}/{key}", value, self.step)
            else:
                writer.add_scalar(f"{group}/{key}", float(value), self.step)
        for key, scheduler in self.schedulers.items():
            writer.add_scalar(f"learning_rate/{key}", scheduler.get_last_lr()[-1], self.step)

    def _validate(self, writer: SummaryWriter, validate: Callable[[nn.Module], dict]) -> None:
        with torch.no_grad():
            figures = validate(self.ema.module)
        self._log(writer, "val", figures)
        numbers = {key: f"{value:.4f}" for key, value in figures.items() if isinstance(value, float)}
        log.info(f"step {self.step}/{self.steps}  " + "  ".join(f"{key} {value}" for key, value in numbers.items()))
        if figures["score"] < self.best:
            self.best = figures["score"]
            notes = {**self.notes, "step": str(self.step), "seed": str(self.settings.seed), **numbers}
            save_weights(self.weights, self.ema.module, self.model.config, **notes)
