"""Instruments for users and tests: comparing runs, explaining differences."""
