"""ScaLearn in `adapters`: its config and layer, its fold into a bottleneck of the host, and its report.

How a fusion acts in a block belongs to `hosts.adapters`, the maths to `fusion`.
"""
