"""ScaLearn in `adapters`: its config and coefficients, folding into one of the host's bottlenecks, and reports.

How a fusion acts in a block is in `hosts.adapters`, the maths in `fusion`.
"""
