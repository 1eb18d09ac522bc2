"""Published studies on whether explanations can be trusted, run anew on real networks and real images.

A study is a module with `NAME`, `TITLE`, `QUESTION` and `run(settings)`; `python -m benchmarks.studies` runs them.
"""

STUDIES = ("fooling", "logit_shift", "adversarial", "region_shift", "contrastive_saliency")
"""The modules, in the order in which they are run and shown."""
