"""`python -m torchalignprune` runs the `torchalignprune` command."""

from torchalignprune.cli import main

raise SystemExit(main())
