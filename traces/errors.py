"""The errors that moesim raises for things a user can mend.

Knows nothing about terminals or exit codes: `moesim.cli` turns a `MoesimError` into one line and exit code 2.

    MoesimError
     ├─ InputError    a file, option or argument is wrong
     │   └─ TraceError    a trace is missing, damaged, or of another version
     └─ PolicyError   a policy asked for something that the cluster cannot do
"""


class MoesimError(Exception):
    """Base of everything that moesim raises on purpose; the message says what is wrong, where, and what to do."""


class InputError(MoesimError):
    """A file, an option or an argument cannot be used."""


class TraceError(InputError):
    """A trace is missing, damaged, inconsistent, or written by a newer version."""


class PolicyError(MoesimError):
    """A policy asked for something impossible: a full slot, a second replica on one GPU, a lost expert."""
