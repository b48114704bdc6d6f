"""What the precision recipes raise.

QuantizeError          everything below; the command line prints it and exits 2
  RangeError           a float16 tensor comes too close to the largest float16
  CalibrationError     the calibration data is missing, damaged, or does not fit the policy
  GateError            a policy of lower precision is too far from float32; the command line exits 1
"""


class QuantizeError(Exception):
    """Base of everything that the precision recipes raise on purpose."""


class RangeError(QuantizeError):
    """The graph would overflow in float16 on the observations it was given."""


class CalibrationError(QuantizeError):
    """No observations can be read from what was given."""


class GateError(QuantizeError):
    """The gate cannot be met."""
