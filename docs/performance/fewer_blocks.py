"""`ltx-train` at the model's real widths with fewer blocks, where all of them do not fit.

LTX_TRAIN_BLOCKS=20 python docs/performance/fewer_blocks.py bench experiment=... adapter=full strategy=zero3 ...
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace

from ltx_train.model import presets

# At import, because processes that the command starts import this file again.
if "LTX_TRAIN_BLOCKS" in os.environ:
    _SIZES = presets.PRESETS["ltx2_3_22b"]
    presets.PRESETS["ltx2_3_22b"] = replace(_SIZES, layers=int(os.environ["LTX_TRAIN_BLOCKS"]))

if __name__ == "__main__":
    from ltx_train.__main__ import main

    sys.exit(main())
