"""Pages whose every command is run, in their order, and what it prints compared."""

from __future__ import annotations

import pytest

from tests.helpers.pages import ELSEWHERE, PAGES, run_page, steps
from tests.helpers.processes import ROOT

RUN = [page for page in PAGES if steps(page) and str(page.relative_to(ROOT)) not in ELSEWHERE]


@pytest.mark.long
@pytest.mark.parametrize("page", RUN, ids=lambda page: page.name)
def test_each_command(page, tmp_path):
    run_page(page, tmp_path)
