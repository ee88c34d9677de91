"""The benchmarks: what crablb costs, beside what people use today, on the machine that they run on.

``crablb bench`` (or ``make bench``) runs the suites, one a module here, and writes a report.

- ``figures``: what is measured: rows, tables, plots.  ``context``: how: in turn, several times, again if disturbed.
- ``micro``, ``xsk``, ``peers``, ``paper``, ``daemon``: the suites.
- ``targets``: the figures that crablb is to reach.  ``report``, ``compare``: what people read.
- ``machine``: everything that is needed to repeat a run.
- ``tools/``: programs in C and BPF that the suites use.
"""
