"""What the exporter raises.

ExportError            everything below; the command line prints it and exits 2
  CheckpointError      the checkpoint cannot be read, or holds something that cannot be exported faithfully
  GraphError           an exported graph breaks the contract (operators, dtypes, shapes)
  ParityError          the graphs do not compute what the checkpoint computes; the command line exits 1
  AuditError           the graphs do not run in the precision they would be labelled; the command line exits 1
"""


class ExportError(Exception):
    """Base of everything that the exporter raises on purpose."""


class CheckpointError(ExportError):
    """The checkpoint is missing, damaged, of another kind, or asks for what is not supported."""


class GraphError(ExportError):
    """An exported graph holds operators, dtypes or shapes that the bundle's contract forbids."""


class ParityError(ExportError):
    """A stage of the exported graphs is over its tolerance."""


class AuditError(ExportError):
    """What ran contradicts the precision that the bundle would claim."""
