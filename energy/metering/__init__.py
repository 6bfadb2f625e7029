"""The meter: joules of named windows of time, with all that speaks against them; the standard library alone."""
