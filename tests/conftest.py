"""Before anything imports Triton: its kernels are interpreted where there is no device for them."""

import os

import torch

if not torch.accelerator.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
