"""One YAML file an experiment -> validated, frozen settings. Every value can be overridden on the command line.

    config = load_config("configs/cats64.yml", {"transformer.depth": 12})
    config.transformer.depth

A file that says `base: other.yml` (beside itself) takes that one's values and lists only what it changes.
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import pydantic
import yaml
from pydantic import Field, field_validator, model_validator

from maskgit.decoding_config import DecodingConfig, TotalIter
from maskgit.hiding import HOLES, POLICIES, checked_weights
from models.autoencoder import VQGANConfig
from models.settings import Settings, dump_yaml, explain, parse_yaml, read_config
from models.transformer import TransformerConfig
from utils import ROOT, check_folder

DEFAULT = ROOT / "configs" / "cats64.yml"
Beta = Annotated[float, Field(ge=0, lt=1)]
Milestones = Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(strict=False)]


class DataConfig(Settings):
    """Folders of images (PNG, JPEG, WebP, BMP; any size)."""

    train: str = Field(description="folder of training images")
    val: str = Field(description="folder of validation images")
    windows: Literal["centre", "random"] = Field(
        "centre",
        description="what is taken of a larger picture: its centre square, resized to vqgan.image_size, or at every "
        "step a random window of that size at the picture's own scale",
    )
    flip: bool = Field(True, description="train on mirrored images too")
    workers: int = Field(4, ge=0, description="threads that decode images")
    memory_mb: int = Field(2048, ge=0, description="images or tokens that need more are kept in files in OUT/cache")


class PerceptualConfig(Settings):
    net: Literal["vgg", "alex"] = Field("vgg", description="backbone of LPIPS")
    weights: str | None = Field(None, description="local file with the backbone's weights; null: download them")
    weight: float = Field(1.0, ge=0, description="weight of LPIPS in the loss; 0: off")
    crop: int = Field(0, ge=0, description="side of the random crop that LPIPS looks at; 0: whole image")


class AdversarialConfig(Settings):
    weight: float = Field(0.0, ge=0, description="weight of the GAN loss beside its adaptive weight; 0: no GAN")
    start: float = Field(0.0, ge=0, description="epoch at which the GAN starts")
    width: int = Field(64, ge=8, description="of the discriminator's first layer")
    layers: int = Field(2, ge=1, description="convolutions of stride 2 after the first")
    learning_rate: float = Field(1e-4, gt=0, description="of the discriminator")


class TrainingConfig(Settings):
    """What both stages share. Epochs may be fractions: they are turned into steps of the optimizer."""

    epochs: float = Field(gt=0, le=1e6, description="passes over the training images")
    batch_size: int = Field(ge=1, description="images a step of the optimizer")
    accumulate: int = Field(1, ge=1, description="micro-batches that a batch is cut into, to save memory")
    learning_rate: float = Field(1e-4, gt=0, description="of Adam, after the warm-up")
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = Field((0.9, 0.999), description="of Adam")
    warmup: float = Field(0.0, ge=0, description="epochs of linear warm-up")
    milestones: Milestones = Field((), description="epochs after which the learning rate is multiplied by gamma")
    gamma: float = Field(0.1, gt=0, le=1, description="factor at each milestone")
    clip: float = Field(0.0, ge=0, description="largest norm of the gradient; 0: no clipping")
    ema: float = Field(0.999, ge=0, lt=1, description="decay of the averaged weights that are validated and saved")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="arithmetic of the networks; auto: bfloat16 where the device has it"
    )
    seed: int = Field(0, ge=0, lt=2**31, description="every draw of the training is a function of it and the step")
    validate_every: float = Field(1.0, gt=0, description="epochs between two validations")
    validate_on: int = Field(0, ge=0, description="validation images looked at; 0: all")
    save_every: int = Field(200, ge=1, description="steps between two checkpoints to resume from")
    keep: Literal["best", "last"] = Field("best", description="weights to save: a GAN has no best loss")
    init: str | None = Field(None, description="weights file to start from")
    compile: bool = Field(False, description="torch.compile the model: minutes to start, then faster steps")

    @model_validator(mode="after")
    def _pieces(self):
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate {self.accumulate} must divide batch_size {self.batch_size}")
        return self


class GuessesConfig(Settings):
    """Decoder finetuning: a transformer of these tokens guesses hidden ones, as it will when inpainting."""

    transformer: str | None = Field(None, description="its weights file; null: hidden tokens are the true ones")
    share: float = Field(0.5, ge=0, le=1, description="of the images of a step; the others keep their true tokens")
    total_iter: TotalIter = Field(4, description="iterations of its decoding, otherwise as `decoding` says")
    expected: float = Field(
        0.0, ge=0, le=1, description="of the guesses: those that come as means of codes, which no GAN sees"
    )


class VQGANTrainingConfig(TrainingConfig):
    l1: float = Field(1.0, ge=0, description="weight of the mean absolute error")
    l2: float = Field(0.0, ge=0, description="weight of the mean squared error")
    perceptual: PerceptualConfig = PerceptualConfig()
    adversarial: AdversarialConfig = AdversarialConfig()
    holes: dict[str, float] = Field(
        {}, description="trains the decoder alone, to read known pixels around holes: families by weight, or all"
    )
    token_noise: float = Field(
        0.0,
        ge=0,
        le=1,
        description="at most this share of an image's tokens, or of those hidden by holes, is decoded as similar codes",
    )
    guesses: GuessesConfig = GuessesConfig()
    blank: bool = Field(
        False, description="with holes: hidden tokens are decoded as zero vectors, so that it fills in one pass, alone"
    )

    @field_validator("holes")
    @classmethod
    def _families(cls, weights: dict[str, float]):
        if weights:
            checked_weights(weights, HOLES, "hole family")
        return weights


class TransformerTrainingConfig(TrainingConfig):
    hiding: dict[str, float] = Field(
        {"cosine": 1.0}, description="policies by weight: bernoulli, uniform, cosine, holes, or one family of holes"
    )
    bernoulli: float = Field(0.5, gt=0, le=1, description="probability of policy bernoulli")
    loss_on: Literal["hidden", "all"] = Field("hidden", description="tokens whose cross-entropy is the loss")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of a target's weight spread over all codes")
    start_from_codes: bool = Field(True, description="start the embedding and the head from the codebook's vectors")

    @field_validator("hiding")
    @classmethod
    def _policies(cls, weights: dict[str, float]):
        checked_weights(weights, POLICIES, "hiding policy")
        return weights


class Config(Settings):
    """One experiment."""

    data: DataConfig
    vqgan: VQGANConfig
    transformer: TransformerConfig
    vqgan_training: VQGANTrainingConfig
    transformer_training: TransformerTrainingConfig
    decoding: DecodingConfig

    @model_validator(mode="after")
    def _stages_agree(self):
        training = self.vqgan_training
        if self.transformer.codes != self.vqgan.codebook.codes:
            raise ValueError(f"transformer.codes {self.transformer.codes} and vqgan.codebook.codes "
                             f"{self.vqgan.codebook.codes} must be equal")  # fmt: skip
        if training.holes and not (self.vqgan.decoder.known_width and training.init):
            raise ValueError("vqgan_training.holes trains a decoder that reads known pixels on top of a trained VQGAN: "
                             "set vqgan.decoder.known_width and vqgan_training.init")  # fmt: skip
        if training.holes and self.vqgan.decoder.pre_filled and not self.decoding.pre_fill:
            raise ValueError("vqgan.decoder.pre_filled learns from holes as decoding shows them: set decoding.pre_fill")
        if training.guesses.transformer and not training.holes:
            raise ValueError("vqgan_training.guesses stand in hidden tokens: set vqgan_training.holes")
        if training.guesses.expected and not training.guesses.transformer:
            raise ValueError("vqgan_training.guesses.expected is of guesses: set vqgan_training.guesses.transformer")
        if training.blank and (training.guesses.transformer or training.token_noise or not training.holes):
            raise ValueError(
                "vqgan_training.blank hides tokens: set vqgan_training.holes, no guesses and no token_noise"
            )
        if self.transformer.tokens != self.vqgan.grid**2:
            raise ValueError(f"transformer.tokens {self.transformer.tokens}: the VQGAN makes {self.vqgan.grid**2}")
        return self


def parse_overrides(arguments: list[str]) -> dict[str, object]:
    """`--a.b VALUE` and `--a.b=VALUE` -> {"a.b": value}, values read as YAML. Raises ValueError on anything else."""
    overrides, rest = {}, list(arguments)
    while rest:
        flag = rest.pop(0)
        key, has_value, value = flag.removeprefix("--").partition("=")
        if not flag.startswith("--") or "." not in key:
            raise ValueError(f"unknown argument {flag!r}; a value of the config is overridden as --section.key VALUE")
        if not has_value:
            if not rest:
                raise ValueError(f"--{key}: a value is missing")
            value = rest.pop(0)
        try:
            overrides[key.replace("-", "_")] = parse_yaml(value)
        except yaml.YAMLError as error:
            raise ValueError(f"--{key}: {value!r} is not a YAML value") from error
    return overrides


def load_config(path=DEFAULT, overrides: dict[str, object] | None = None, root: type[Settings] = Config) -> Settings:
    """The `root` in the YAML file `path`, its base included, with dotted `overrides` applied.

    Raises FileNotFoundError, or ValueError that names file, key, value and what was expected.
    """
    values = read_config(path, root)
    for key, value in (overrides or {}).items():
        *sections, name = key.split(".")
        node = values
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise ValueError(f"--{key}: {section} is a value, not a section")
        node[name] = value
    try:
        return root.model_validate(values)
    except pydantic.ValidationError as error:
        raise ValueError("\n".join([f"{path}:", *explain(error, root)])) from error


def to_yaml(settings: Settings, indent: str = "") -> str:
    """All of the settings as YAML, every key with its description: what `load_config` reads back."""
    lines = []
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        if isinstance(value, Settings):
            lines += [f"{indent}{name}:", to_yaml(value, indent + "  ")]
        else:
            plain = json.loads(json.dumps(value))  # tuples become lists
            told = f"  # {field.description}" if field.description else ""
            lines.append(f"{indent}{name}: {dump_yaml(plain)}{told}")
    return "\n".join(lines)


def add_flag(parser: argparse.ArgumentParser, *names: str, **options) -> None:
    """Adds a flag that is understood with hyphens and with underscores, as the lab writes both."""
    spellings = dict.fromkeys(s for name in names for s in (name, "--" + name[2:].replace("-", "_")))
    parser.add_argument(*spellings, **options)


def whole(least: int) -> Callable[[str], int]:
    """The type of a flag: a whole number from `least` to 2^63 - 1."""

    def number(text: str) -> int:
        if not text.isdecimal() or len(text) > 19 or not least <= int(text) < 2**63:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, found {text[:40]!r}")
        return int(text)

    return number


def at_least(least: float) -> Callable[[str], float]:
    """The type of a flag: a finite number of at least `least`."""

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value < math.inf:
            raise argparse.ArgumentTypeError(f"expected a number of at least {least:g}, found {text[:40]!r}")
        return value

    return number


def training_parser(description: str, section: str) -> argparse.ArgumentParser:
    """The command line of a training script: its own flags and the lab's; the rest are overrides."""
    parser = argparse.ArgumentParser(
        description=description,
        epilog=f"Any value of the config is overridden as --section.key VALUE, e.g. --{section}.learning_rate 3e-4.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", default=str(DEFAULT), help="the experiment (default: configs/cats64.yml)")
    parser.add_argument("--out", help="folder of checkpoints and logs (default: checkpoints/NAME OF THE CONFIG)")
    parser.add_argument("--print-config", action="store_true", help="print all settings, with what they mean, and stop")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    parser.add_argument(
        "--profile", type=int, default=0, metavar="N", help="record N steps after the first into OUT/profile"
    )
    for flag, key, kind in (
        ("--train_d_path", "data.train", str),
        ("--val_d_path", "data.val", str),
        ("--num-workers", "data.workers", int),
        ("--batch-size", f"{section}.batch_size", int),
        ("--learning-rate", f"{section}.learning_rate", float),
        ("--epochs", f"{section}.epochs", float),
        ("--init", f"{section}.init", str),
    ):
        add_flag(parser, flag.replace("_", "-"), dest=key, type=kind, metavar="VALUE", help=f"overrides {key}")
    return parser


def parse_training(parser: argparse.ArgumentParser, argv: list[str] | None) -> tuple[argparse.Namespace, Config, Path]:
    """Arguments, config and the folder of the run; what is wrong ends the program with a message."""
    args, rest = parser.parse_known_args(argv)
    if args.profile < 0:
        parser.error(f"--profile {args.profile}: expected a number of steps")
    lab = {key: value for key, value in vars(args).items() if "." in key and value is not None}
    try:
        config = load_config(args.config, lab | parse_overrides(rest))
        folder = check_folder(Path(args.out or Path("checkpoints") / Path(args.config).stem), "--out")
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    if args.print_config:
        print(to_yaml(config))
        parser.exit()
    return args, config, folder
