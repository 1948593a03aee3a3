"""What others publish, read as data and never as code: data sets, and weights of classifiers.

Published diffusion models stand in teachers/. This room imports common alone.
"""
