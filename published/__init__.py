"""What others publish, read as data and never as code: data sets, and weights of classifiers.

Published diffusion models stand in teachers/. The cards of what this project publishes are here,
too (cards.py, model_card.py, set_card.py). This room imports common alone.
"""
