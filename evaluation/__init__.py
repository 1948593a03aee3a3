"""What only evaluate.py needs: attacks, sanity checks, results, comparison, export.

This room imports `common` alone. Attacks that training uses too are in common/attacks.py.
"""
