"""What both training stages share: one `Run` that steps, averages, validates, logs, saves and resumes.

Every random draw is a function of (seed, step), so N steps, a checkpoint and N more are bit-equal to 2 N steps; and it
is made for the whole batch, of which each process of torchrun takes its rows, so their number changes nothing either.
In the folder of a run: NAME.safetensors (the averaged weights, best or last: all that inference needs), NAME_last.pt
(everything that --resume needs; NAME_former.pt: the one before), training.lock while it is at work, tensorboard/, and
with them cache/ (see dataset.Store) and profile/ (--profile).
"""

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from config import DataConfig, TrainingConfig
from files import held, replace_file
from interrupts import Stopped, signals_kept
from maskgit.dataset import ImageDataset, Store
from models.checkpoint import load_tensors, read_archive, read_weights, save_weights
from models.distributed import mean, rank, summed, world
from training.stepping import NotFiniteError, averaged, lr_schedule
from utils import first_on_machine, leave_processes, log, mix, one_line, profile

VAL_SEED = 2**31  # of the holes to validate on, which no training draws from


def start_from(model: nn.Module, path: str, new: tuple[str, ...] = ()) -> None:
    """Copies the weights file `path` into `model`; only keys that begin with one of `new` may be missing there.

    Raises ValueError where it does not fit.
    """
    tensors = read_weights(path)[0]
    fresh = {key: value for key, value in model.state_dict().items() if key.startswith(new)} if new else {}
    load_tensors(model, fresh | tensors, path)


@contextlib.contextmanager
def alone(folder: Path, name: str, resume: bool) -> Iterator[None]:
    """No other training runs in the folder; and there is none there yet, unless it is to `resume`.

    Raises ValueError: another process is at work, or there are files of a training of this `name`.
    """
    with held(folder / "training.lock", "a training") if rank() == 0 else contextlib.nullcontext():
        files = [folder / f"{name}{ending}" for ending in ("_last.pt", "_former.pt", ".safetensors")]
        there = [path.name for path in files if path.exists()]
        if there and not resume:
            raise ValueError(f"{folder}: there is a training already ({there[0]}); --resume goes on with it, "
                             "--out DIR starts one elsewhere")  # fmt: skip
        yield


def open_store(folder: Path, data: DataConfig) -> Store:
    """Where a run keeps images and tokens; several processes share files, whatever their size."""
    return Store(folder / "cache", data.memory_mb * 2**20 if world() == 1 else -1)


def load_images(data: DataConfig, size: int, store: Store) -> tuple[ImageDataset, ImageDataset]:
    """The training and the validation images. Raises ValueError naming what cannot be read."""
    val_windows = "fixed" if data.windows == "random" else data.windows
    with first_on_machine():
        train, val = (
            ImageDataset(path, size, data.workers, store, name, windows)
            for name, path, windows in (("train", data.train, data.windows), ("val", data.val, val_windows))
        )
    return train, val


@dataclass
class Pace:
    """What some steps took: images, seconds, and the seconds of them that waited for the batch."""

    images: int = 0
    seconds: float = 0.0
    waited: float = 0.0

    def add(self, images: int, seconds: float, waited: float) -> None:
        self.images, self.seconds, self.waited = self.images + images, self.seconds + seconds, self.waited + waited

    def figures(self) -> dict[str, float]:
        return {"waiting": self.waited / self.seconds, "images_per_second": self.images / self.seconds}


class Run:
    """The training of `model` on `examples` images.

    `fetch(step, indices) -> batch` reads and draws what a step needs, in a thread of its own, during the step before;
    `update(step, batch) -> losses` does one step of the optimizers and returns detached scalars;
    `validate(model) -> figures` looks at the averaged model; its figure `score` (lower is better) picks the best.
    Raises ValueError where a batch cannot be cut evenly.
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
        if self.batch % (settings.accumulate * world()):
            raise ValueError(
                f"{self.batch} images a step (batch_size, or all there are): expected a multiple of accumulate "
                f"{settings.accumulate} times {world()} processes"
            )
        self.per_epoch = examples // self.batch
        self.steps = max(1, round(settings.epochs * self.per_epoch))
        self.ema = averaged(model, settings.ema)
        self.optimizers, self.modules = optimizers, {"model": model, "ema": self.ema, **(modules or {})}
        self.options = {  # the config's, whatever a checkpoint says
            key: [{name: value for name, value in group.items() if name != "params"} for group in opt.param_groups]
            for key, opt in optimizers.items()
        }
        self.notes = notes or {}  # further metadata of the weights file
        self._schedule()
        self.step, self.best = 0, math.inf
        self.order = (-1, torch.empty(0))  # an epoch and its permutation

    @property
    def checkpoint(self) -> Path:
        return self.folder / f"{self.name}_last.pt"

    @property
    def former(self) -> Path:
        return self.folder / f"{self.name}_former.pt"

    @property
    def weights(self) -> Path:
        return self.folder / f"{self.name}.safetensors"

    @property
    def stateful(self) -> dict:
        """What a checkpoint holds, by its key there."""
        return self.modules | {f"optimizer_{key}": optimizer for key, optimizer in self.optimizers.items()}

    def save(self) -> None:
        """Writes NAME_last.pt; the one before becomes NAME_former.pt. Raises OSError naming what cannot be written."""
        state = {"step": self.step, "best": self.best, "steps_an_epoch": self.per_epoch}
        state |= {key: thing.state_dict() for key, thing in self.stateful.items()}
        with self._saving(self.checkpoint):
            replace_file(self.checkpoint, lambda path: torch.save(state, path), former=self.former.name)

    @contextlib.contextmanager
    def _saving(self, path: Path) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError) as error:  # the latter is what torch.save raises where the disk is full
            why = f"step {self.step} cannot be saved ({one_line(error)}); {self._kept()}"
            raise OSError(f"{path}: {why}") from error

    def _kept(self) -> str:
        """Which checkpoint a training that stops here leaves."""
        return f"last good checkpoint: {self.checkpoint if self.checkpoint.is_file() else 'none yet'}"

    def carry_out(self, trainer, profiled: int = 0) -> None:
        """`fit` with the `fetch`, `update` and `validate` of a trainer, and where the weights are.

        Ends the program with a line and exit status 1 where the numbers or the disk fail. Raises Stopped.
        """
        try:
            self.fit(trainer.fetch, trainer.update, trainer.validate, profiled)
        except (NotFiniteError, OSError) as error:
            raise SystemExit(f"error: {error}") from error
        log.info(f"weights: {self.weights}")
        leave_processes()

    def resume(self) -> None:
        """Takes up the last checkpoint, or, where a kill left that one alone, the one before it.

        Raises FileNotFoundError, or ValueError where it is of another run.
        """
        if self.former.is_file() and not self.checkpoint.exists():
            self.former.replace(self.checkpoint)
        if not self.checkpoint.is_file():
            raise FileNotFoundError(f"{self.checkpoint}: nothing to resume from")
        try:
            state = read_archive(self.checkpoint)
        except (OSError, ValueError) as error:
            hint = f"; the one before is {self.former}" if self.former.is_file() else ""
            raise ValueError(f"{self.checkpoint}: not a checkpoint ({one_line(error)}){hint}") from error
        kinds = {"steps_an_epoch": int, "step": int, "best": (int, float)}
        if not isinstance(state, dict) or not all(isinstance(state.get(key), kind) for key, kind in kinds.items()):
            raise ValueError(f"{self.checkpoint}: not a checkpoint of a training")
        if state["steps_an_epoch"] != self.per_epoch:
            raise ValueError(
                f"{self.checkpoint}: {state['steps_an_epoch']} steps an epoch, now {self.per_epoch}: "
                "other data or another batch size"
            )
        try:
            for key, groups in self.options.items():
                for group, options in zip(state[f"optimizer_{key}"]["param_groups"], groups, strict=True):
                    group.update(options)
            for key, thing in self.stateful.items():
                thing.load_state_dict(state[key])
        except (LookupError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{self.checkpoint}: does not fit this config: {one_line(error)}") from error
        self._schedule()
        self.step, self.best = state["step"], state["best"]
        if self.step < 0:
            raise ValueError(f"{self.checkpoint}: step {self.step}, expected 0 or more")
        if self.step > self.steps:
            raise ValueError(
                f"{self.checkpoint}: at step {self.step} already, the config says {self.steps}; raise epochs"
            )
        log.info(f"resumed {self.checkpoint} at step {self.step} of {self.steps}")

    def _schedule(self) -> None:
        """Learning rates as the config says, whatever a checkpoint holds, at step 0."""
        for key, optimizer in self.optimizers.items():
            for group, options in zip(optimizer.param_groups, self.options[key], strict=True):
                group["lr"] = options["lr"]
                group.pop("initial_lr", None)
        self.schedules = [lr_schedule(x, self.settings, self.per_epoch) for x in self.optimizers.values()]
        self.scheduled = 0

    def _set_rates(self) -> None:
        """Learning rates of the step to come: the same after a resume, since they go through all steps before."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch expects a step of the optimizer before each
            while self.scheduled < self.step:
                for schedule in self.schedules:
                    schedule.step()
                self.scheduled += 1

    def indices(self, step: int) -> Tensor:
        """The examples of a step: a slice of the epoch's permutation."""
        epoch, start = step // self.per_epoch, (step % self.per_epoch) * self.batch
        if self.order[0] != epoch:  # a million numbers take 40 ms
            generator = torch.Generator().manual_seed(mix(self.settings.seed, 1, epoch))
            self.order = (epoch, torch.randperm(self.examples, generator=generator))
        return self.order[1][start : start + self.batch]

    def fit(
        self,
        fetch: Callable[[int, Tensor], object],
        update: Callable[[int, object], dict[str, Tensor]],
        validate: Callable[[nn.Module], dict],
        profiled: int = 0,
    ) -> None:
        """Trains up to the last step, `profiled` of them recorded; SIGINT and SIGTERM end it after the step at hand.

        Process 0 validates, logs and saves; the others wait for it where gradients meet. Raises NotFiniteError, the
        last checkpoint intact; OSError, naming what cannot be written; Stopped by a signal, all steps saved.
        """
        every = max(1, round(self.settings.validate_every * self.per_epoch))
        first, batches, whole, recent = rank() == 0, self._batches(fetch), Pace(), Pace()
        trace = self.folder / "profile" / f"{self.name}_{rank()}.pt.trace.json"
        options = {"desc": self.name, "unit": "step", "mininterval": 1.0, "disable": not first}
        with (
            self._writer() if first else contextlib.nullcontext() as writer,
            profile(trace, profiled) as profiler_step,
            tqdm(total=self.steps, initial=self.step, **options) as bar,
            signals_kept() as signal_number,
        ):
            while self.step < self.steps:
                begin = time.perf_counter()
                batch = next(batches)
                waited = time.perf_counter() - begin
                losses = self._train(update, batch)
                for pace in (whole, recent):
                    pace.add(self.batch, time.perf_counter() - begin, waited)
                profiler_step()
                bar.update()
                done = self.step == self.steps
                if self.step % 20 == 0 or done:
                    losses = {key: float(mean(value)) for key, value in losses.items()}
                    if first:
                        self._log(writer, "train", losses | recent.figures())
                    bar.set_postfix({key: f"{value:.4g}" for key, value in losses.items()}, refresh=False)
                    recent = Pace()
                if first and (self.step % every == 0 or done):
                    self._validate(writer, validate)
                stopped = self._told_to_stop(signal_number())
                if first and (self.step % self.settings.save_every == 0 or done or stopped):
                    self.save()
                if stopped and not done:
                    raise Stopped(stopped, f"saved step {self.step}; --resume goes on")
        if whole.images:
            pace = whole.figures()
            log.info(f"{pace['images_per_second']:.4g} images/s, {pace['waiting']:.1%} of the time waiting for them")

    def _told_to_stop(self, number: int) -> int:
        """The signal that process 0 was sent, 0 for none."""
        if world() == 1:
            return number
        device = next(self.model.parameters()).device
        return int(summed(torch.tensor(number if rank() == 0 else 0, device=device)))

    def _writer(self) -> SummaryWriter:
        """A resumed run keeps what was logged so far."""
        return SummaryWriter(self.folder / "tensorboard" / self.name, purge_step=self.step + 1)

    def _batches(self, fetch: Callable[[int, Tensor], object]) -> Iterator:
        """What `fetch` returns for every step left, one step ahead."""
        with ThreadPoolExecutor(1) as thread:
            coming = None
            for step in range(self.step, self.steps):
                batch = coming.result() if coming else fetch(step, self.indices(step))
                if step + 1 < self.steps:
                    coming = thread.submit(fetch, step + 1, self.indices(step + 1))
                yield batch

    def _train(self, update: Callable[[int, object], dict[str, Tensor]], batch) -> dict[str, Tensor]:
        torch.manual_seed(mix(self.settings.seed, 2, self.step, rank()))  # dropout
        self.model.train()
        self._set_rates()
        try:
            losses = update(self.step, batch)
        except NotFiniteError as error:
            raise NotFiniteError(f"step {self.step}: {error}; {self._kept()}") from error
        self.ema.update_parameters(self.model)
        self.step += 1
        return losses

    def _log(self, writer: SummaryWriter, group: str, values: dict) -> None:
        for key, value in values.items():
            if isinstance(value, Tensor) and value.ndim == 3:
                writer.add_image(f"{group}/{key}", value, self.step)
            else:
                writer.add_scalar(f"{group}/{key}", float(value), self.step)
        for key, optimizer in self.optimizers.items():
            writer.add_scalar(f"learning_rate/{key}", optimizer.param_groups[-1]["lr"], self.step)

    def _validate(self, writer: SummaryWriter, validate: Callable[[nn.Module], dict]) -> None:
        with torch.no_grad():
            figures = validate(self.ema.module)
        self._log(writer, "val", figures)
        numbers = {key: f"{value:.4f}" for key, value in figures.items() if isinstance(value, float)}
        log.info(f"step {self.step}/{self.steps}  " + "  ".join(f"{key} {value}" for key, value in numbers.items()))
        better = figures["score"] < self.best
        self.best = min(self.best, figures["score"])
        if better or self.settings.keep == "last":
            notes = {**self.notes, "step": str(self.step), "seed": str(self.settings.seed), **numbers}
            with self._saving(self.weights):
                save_weights(self.weights, self.ema.module, self.model.config, **notes)
