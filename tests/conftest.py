"""Before anything imports Triton: its kernels are interpreted here, there is no device for them."""

import os

os.environ["TRITON_INTERPRET"] = "1"
