"""`python -m hesso_hf`, `accelerate launch -m hesso_hf`, `torchrun -m hesso_hf`."""

import sys

from .cli.main import main

sys.exit(main())
