"""Will it fit, how long will a step take, and would another layout be better: without a GPU, before a run.

README.md has the formulas, their sources, and how far the results are from what was measured and published.
"""
