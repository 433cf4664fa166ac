"""Stage 1: images -> a VQGAN checkpoint; stage 1b: its decoder learns to read the known pixels around holes.

python training_vqgan.py --config configs/cats64.yml
python training_vqgan.py --config configs/cats64_known.yml
"""

import torch

from config import parse_training, training_parser
from models.distributed import world
from training.autoencoder import Stage1
from training.run import Run, load_images, open_store
from utils import join_processes, leave_processes, log, start_logging


def main(argv: list[str] | None = None) -> None:
    """The command line; see --help."""
    start_logging()
    parser = training_parser(__doc__, "vqgan_training")
    args, config, folder = parse_training(parser, argv)
    try:
        device = join_processes(args.device)
        folders = load_images(config.data, config.vqgan.image_size, open_store(folder, config.data))
        train, val = folders[0].maps, folders[1].images
        torch.manual_seed(config.vqgan_training.seed)
        stage = Stage1(config, device, train, val)
        run = Run("vqgan", folder, config.vqgan_training, len(train), stage.model, stage.optimizers, stage.modules)
        if args.resume:
            run.resume()
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        parser.error(str(error))
    counts = f"{len(train)} training and {len(val)} validation images, {run.steps} steps"
    log.info(f"stage 1: {counts}, on {world()} x {device.type}")
    run.fit(stage.fetch, stage.update, stage.validate, args.profile)
    log.info(f"weights: {run.weights}")
    leave_processes()


if __name__ == "__main__":
    main()
