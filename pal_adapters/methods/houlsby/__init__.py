"""Houlsby bottlenecks (in PEFT; `adapters` has its own), and the two variants that the PALs paper compares with."""
