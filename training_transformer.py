"""Stage 2: a frozen VQGAN turns images into tokens, once; a transformer learns to predict the hidden ones.

python training_transformer.py --config configs/cats64.yml
"""

if __name__ == "__main__":
    import interrupts

    interrupts.in_one_line()

import contextlib

import torch

from config import parse_training, training_parser
from interrupts import run_script
from models.distributed import world
from training.run import Run, alone, load_images, open_store
from training.transformer import TransformerTrainer, frozen_vqgan, load_tokens
from utils import first_on_machine, join_processes, log, start_logging


def main(argv: list[str] | None = None) -> None:
    """The command line; see --help."""
    start_logging()
    parser = training_parser(__doc__, "transformer_training")
    parser.add_argument("--vqgan", help="weights of stage 1, e.g. VQGAN.pt (default: vqgan.safetensors in --out)")
    args, config, folder = parse_training(parser, argv)
    with contextlib.ExitStack() as stack:
        try:
            device, store = join_processes(args.device), open_store(folder, config.data)
            stack.enter_context(alone(folder, "transformer", args.resume))
            with first_on_machine():
                vqgan = frozen_vqgan(args.vqgan, folder, config).to(device)
            train, val = load_images(config.data, vqgan.config.image_size, store)
            key = vqgan.tokens_key()
            tokens = load_tokens(vqgan, train, key, device, 1 + config.data.flip, store)
            val_tokens = load_tokens(vqgan, val, key, device, 1, store).stack().flatten(1)
            torch.manual_seed(config.transformer_training.seed)
            trainer = TransformerTrainer(config, device, vqgan, tokens, val_tokens, val.images)
            notes = {"decoding": config.decoding.model_dump_json(), "vqgan": key}
            settings, optimizers = config.transformer_training, {"adam": trainer.optimizer}
            run = Run("transformer", folder, settings, len(train), trainer.model, optimizers, notes=notes)
            if args.resume:
                run.resume()
        except (ValueError, OSError) as error:
            parser.error(str(error))
        counts = f"{len(train)} training and {len(val)} validation images, {run.steps} steps"
        log.info(f"stage 2: {counts}, on {world()} x {device.type}")
        run.carry_out(trainer, args.profile)


if __name__ == "__main__":
    run_script(main)
