#!/usr/lib/crablb/bin/python3
import sys

from crablb.cli import main

sys.exit(main())
