"""``python -m crablb``."""

from crablb.cli import main

raise SystemExit(main())
