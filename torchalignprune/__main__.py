"""`python -m torchalignprune` is the same as the command `torchalignprune`."""

from torchalignprune.cli import main

raise SystemExit(main())
