"""Houlsby bottlenecks (in PEFT; `adapters` has its own), and the two variants in the PALs paper."""
