"""The tables of finished runs: who stands where, on which terms, beside what was published."""
