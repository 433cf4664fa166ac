"""The weights that are here: `listing`, a table of them."""

from collections.abc import Iterable
from pathlib import Path

from maskgit.inpainter import Inpainter
from utils import ROOT

SHELVES = (ROOT / "pretrained", Path("checkpoints"))  # the trainings write to checkpoints/ of the current folder
LINE = "{:<30} {:>9} {:>22} {:>14} {:>16}"


def listing(shelves: Iterable[Path] = SHELVES) -> str:
    """A table of the folders in `shelves` that hold weights; one that cannot be loaded has a line that says why."""
    folders = [path.parent for shelf in shelves for path in sorted(shelf.glob("*/*.safetensors"))]
    if not folders:
        return f"no weights in {' or '.join(map(str, shelves))}"
    head = LINE.format("--checkpoint", "pictures", "tokens", "parameters", "files")
    return "\n".join([head, *(line for folder in dict.fromkeys(folders) for line in described(folder))])


def described(folder: Path) -> list[str]:
    """Name, size of the pictures, tokens, and parameters and file sizes of VQGAN + transformer; the model card."""
    name = str(folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder)
    if not (folder / "transformer.safetensors").is_file():
        return [f"{name}  stage 1 alone: training_transformer.py --vqgan {name}/vqgan.safetensors goes on"]
    try:
        inpainter = Inpainter.from_pretrained(folder, "cpu")
    except (ValueError, OSError) as error:
        return [f"{name}  cannot be used: {error}"]
    config, side = inpainter.vqgan.config, inpainter.vqgan.config.grid
    networks = inpainter.vqgan, inpainter.transformer
    parameters = [sum(parameter.numel() for parameter in network.parameters()) / 1e6 for network in networks]
    sizes = [(folder / f"{file}.safetensors").stat().st_size / 1e6 for file in ("vqgan", "transformer")]
    tokens = f"{side}x{side} of {config.codebook.codes:,} codes"
    line = LINE.format(name, f"{inpainter.size}x{inpainter.size}", tokens, _sum(parameters, "M"), _sum(sizes, "MB"))
    return [line, f"    {_first_words(folder / 'README.md')}"]


def _sum(values: list[float], unit: str) -> str:
    return " + ".join(f"{value:.1f}" for value in values) + f" {unit}"


def _first_words(card: Path) -> str:
    """The first line of a model card that is no heading, up to its first full stop."""
    lines = card.read_text(encoding="utf-8").splitlines() if card.is_file() else []
    first = next((line.strip() for line in lines if line.strip() and not line.startswith("#")), "no model card")
    return first.partition(". ")[0].rstrip(".")
