"""`python -m fusion_passes bench`: times of the ops' cases and of whole models, beside stock Inductor and others.

`cli` is the command line. `cases` finds what the ops declare, `contestants` builds what is timed, `runner` and `models`
measure it, `results` is what a measurement leaves behind, and `verdicts`, `comparison`, `tables` and `plots` read that.
How times are taken is in `fusion_passes.benchmarking`.
"""
