"""What torchrun starts in test_processes.py: both training scripts, one after the other, in one group of processes.

python -m torch.distributed.run --nproc-per-node 2 tests/two_processes.py FILE, a JSON list of command lines: a script's
name, then its arguments.
"""

import importlib
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
torch.set_num_threads(1)
leave = torch.distributed.destroy_process_group
torch.distributed.destroy_process_group = lambda: None  # torchrun's processes meet once; the scripts leave each time
for script, *arguments in json.loads(Path(sys.argv[1]).read_text()):
    importlib.import_module(script).main(arguments)
leave()  # one that ends with the group's threads at work may abort
