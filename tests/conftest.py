"""Every signature of raykernel is checked at run time, in the tests' own process."""

from tests import typed

typed.install("raykernel")
