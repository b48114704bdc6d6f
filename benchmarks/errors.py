"""What the benchmarks raise.

BenchError           everything below; the command line prints it and exits 2
  ResultError        a result cannot be read, or is of another version
"""


class BenchError(Exception):
    """Base of everything that the benchmarks raise on purpose: what was given cannot be compared."""


class ResultError(BenchError):
    """The file is no result of this version."""
