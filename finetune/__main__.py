"""`python -m finetune`, the same as the `finetune` command."""

from __future__ import annotations

from finetune.cli import main

main()
