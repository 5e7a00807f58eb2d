"""Numbers of the random streams of a run's seed beside those of its steps, which have the numbers below 2**31."""

INITIAL, EXPLORATION, SEARCH = 2**31, 2**31 + 1, 2**31 + 2
