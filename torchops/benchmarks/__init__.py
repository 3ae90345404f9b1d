"""Benchmarks of torchops against what one would write without it: ``python -m torchops bench <family>``.

A family is a module of this package, found by name, with

- ``rows(options) -> Iterator[Row]``: what is measured (see :mod:`torchops.benchmarks.harness.rows`);
- ``OPERATIONS``: the same for sizes that the command line gives, by operation (:class:`~.harness.Operation`);
- ``NOTES``: sentences for the reader of the figures, printed under the tables and kept in the JSON;
- if it has them, ``CURVES``: plots besides that of all ratios, and ``findings(report) -> Sequence[Finding]``:
  tables that it makes of its figures.

Benchmarks are not tests: nothing here fails because of a time.
"""

import os

# The profiler, which measures memory, otherwise logs every start and stop of a run. Read at its first start.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
