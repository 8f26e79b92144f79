"""torchrun without what it adds to an interruption: ``python -m vzip.train.torchrun``, with torchrun's own options.

The processes say themselves what is kept; torchrun would print its warnings and two tracebacks after that.
"""

from __future__ import annotations

import logging
import os
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.run import main

if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # what torchrun sets, with four lines that say so
    for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed")]:
        logging.getLogger(name).setLevel(logging.ERROR)  # each has a level of its own
    try:
        main()
    except SignalException as error:
        sys.exit(128 + error.sigval)
