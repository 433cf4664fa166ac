"""Stage 1: images -> a VQGAN checkpoint; decoder finetuning: it learns to read the known pixels around holes.

python training_vqgan.py --config configs/cats64.yml
python training_vqgan.py --config configs/cats64_decoder.yml
"""

if __name__ == "__main__":
    import interrupts

    interrupts.in_one_line()

import contextlib
import shutil
from pathlib import Path

import torch

from config import parse_training, training_parser
from files import replace_file
from interrupts import run_script
from models.checkpoint import file_hash
from models.distributed import world
from training.autoencoder import VQGANTrainer
from training.run import Run, alone, load_images, open_store
from utils import first_on_machine, join_processes, log, start_logging


def keep_beside(transformer: Path, target: Path) -> None:
    """Copies the transformer that guesses to `target`, beside the new VQGAN: its tokens are still those it knows.

    Raises ValueError where another one is there.
    """
    if not target.exists():
        replace_file(target, lambda temporary: shutil.copyfile(transformer, temporary))
    elif file_hash(target) != file_hash(transformer):
        raise ValueError(f"{target}: another transformer than {transformer}; take another --out, or remove it")


def main(argv: list[str] | None = None) -> None:
    """The command line; see --help."""
    start_logging()
    parser = training_parser(__doc__, "vqgan_training")
    args, config, folder = parse_training(parser, argv)
    with contextlib.ExitStack() as stack:
        try:
            device = join_processes(args.device)
            stack.enter_context(alone(folder, "vqgan", args.resume))
            folders = load_images(config.data, config.vqgan.image_size, open_store(folder, config.data))
            train, val = folders[0].maps, folders[1].images
            torch.manual_seed(config.vqgan_training.seed)
            trainer = VQGANTrainer(config, device, train, val)
            settings, own = config.vqgan_training, (trainer.model, trainer.optimizers, trainer.modules)
            run = Run("vqgan", folder, settings, len(train), *own)
            if args.resume:
                run.resume()
            if guessing := settings.guesses.transformer:
                with first_on_machine():
                    keep_beside(Path(guessing), run.weights.with_name("transformer.safetensors"))
        except (ValueError, OSError, RuntimeError) as error:
            parser.error(str(error))
        counts = f"{len(train)} training and {len(val)} validation images, {run.steps} steps"
        log.info(f"stage 1: {counts}, on {world()} x {device.type}")
        run.carry_out(trainer, args.profile)


if __name__ == "__main__":
    run_script(main)
