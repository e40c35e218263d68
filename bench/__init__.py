"""What is measured, against whom: `python -m bench.operators` (of an installed package: `vae-fast bench`),
`python -m bench.accuracy`, `python -m bench.training`, `pytest bench/ --benchmark-only`; on a machine with a
GPU `python -m bench.gpu`, which builds, tests and measures everything."""

import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
if not list(_ROOT.glob("vae_fast/_C.*.so")) and str(_ROOT) in sys.path:
    # `python -m` puts the source tree first; without an extension in it, the installed package is meant.
    sys.path.remove(str(_ROOT))
    sys.path.append(str(_ROOT))
