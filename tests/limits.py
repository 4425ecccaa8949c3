"""The one time limit of the tests."""

# Seconds after which something hangs, however busy the machine is.
HANGS_AFTER = 1800
